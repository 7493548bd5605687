"""The growing cache against transformers' own, in all that `generate` does with one, and its memory."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.cache import FIRST_ROOM, GrowingCache


def step(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2, length, 8), torch.randn(3, 2, length, 8)


def test_it_holds_what_transformers_cache_holds() -> None:
    """Prompt, single tokens, cropping, beams reordered, rows selected, repeated and reset, in between."""
    ours, theirs = GrowingCache(), DynamicCache()
    changes = {
        5: lambda cache: cache.crop(-3),
        9: lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        13: lambda cache: cache.batch_select_indices(torch.tensor([0, 1, 2])),
        17: lambda cache: cache.crop(-20),
        21: lambda cache: cache.reset(),
    }
    for number in range(30):
        for layer in range(2):
            new = step(70 if number == 0 else 1 + number % 3)
            mine, expected = ours.update(*new, layer), theirs.update(*new, layer)
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True)), number
        assert ours.get_seq_length() == theirs.get_seq_length()
        if number in changes:
            changes[number](ours)
            changes[number](theirs)


def test_nothing_is_copied_while_there_is_room() -> None:
    cache = GrowingCache()
    keys, _ = cache.update(*step(10), 0)
    for _ in range(FIRST_ROOM - 10):
        more, _ = cache.update(*step(1), 0)
        assert more.data_ptr() == keys.data_ptr()
    more, _ = cache.update(*step(1), 0)
    assert more.data_ptr() != keys.data_ptr()


def test_memory_follows_what_is_used() -> None:
    """At most half as much again as is held, whatever the model's context; copied a dozen times, not for each token."""
    cache, places = GrowingCache(), [0]
    for length in range(1, 3001):
        held = cache.update(*step(1), 0)
        used, least = sum(x.nbytes for x in held), FIRST_ROOM * 2 * 3 * 2 * 8 * 4
        assert used == length * least / FIRST_ROOM
        assert used <= sum(x.nbytes for x in cache.layers[0].storage) <= 1.51 * max(used, least)
        if held[0].data_ptr() != places[-1]:
            places.append(held[0].data_ptr())
    assert len(places) <= 12


def test_a_reset_cache_takes_another_batch() -> None:
    """Into storage of the old one its rows would be written once for each of the old rows."""
    cache = GrowingCache()
    cache.update(*step(5), 0)
    cache.reset()
    assert cache.layers[0].storage is None
    new = [x[:1] for x in step(2)]
    assert all(torch.equal(a, b) for a, b in zip(cache.update(*new, 0), new, strict=True))


def test_an_emptied_cache_takes_another_batch() -> None:
    """transformers' own fails where rows were cropped to nothing; the old storage would have one row stand in three."""
    cache, new = GrowingCache(), [x[:1] for x in step(2)]
    cache.update(*step(5), 0)
    cache.crop(-5)
    assert all(torch.equal(a, b) for a, b in zip(cache.update(*new, 0), new, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 3}, {"prompt_lookup_num_tokens": 3}]
)
def test_it_generates_the_same_tokens(options: dict[str, int]) -> None:
    fields = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **fields)).eval()
    ids = torch.randint(0, 97, (1 if "prompt_lookup_num_tokens" in options else 2, 9))
    keywords = {"max_new_tokens": 70, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(ids, **keywords)
    assert torch.equal(model.generate(ids, past_key_values=GrowingCache(), **keywords), expected)
