"""Batches give what single prompts give; every setting reaches transformers; limits are refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data.cli import UserError
from launch.generation import sampler
from launch.generation.sampler import TextPenalty, batches, check_length, complete, left_padded
from launch.generation.sampling import LEAST_TEMPERATURE, Sampling
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.cache import GrowingCache


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0")))


@pytest.fixture(scope="module")
def model() -> MoEGPTForCausalLM:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    return MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **fields, eos_token_id=5, attn_implementation="sdpa")).eval()


PROMPTS = [[11, 12, 13], [40, 41, 42, 43, 44, 45, 46], [7]]


def test_a_batch_is_its_prompts(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=0)
    together, _ = complete(model, words, PROMPTS, sampling)
    alone = [complete(model, words, [ids], sampling)[0][0] for ids in PROMPTS]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.prompt for one in together] == [0, 1, 2]
    assert len({one.text for one in together}) == 3


@pytest.mark.parametrize("prompts", [1, 3, 5])
@pytest.mark.parametrize("copies", [1, 2, 7])
@pytest.mark.parametrize("most", [0, 1, 2, 4, 100])
def test_batches_cover_each_sequence_once_in_order(prompts: int, copies: int, most: int) -> None:
    found = list(batches(prompts, copies, most))
    assert [prompt for part, count in found for prompt in part for _ in range(count)] == [
        prompt for prompt in range(prompts) for _ in range(copies)
    ]
    assert all(len(part) * count <= max(most, 1) for part, count in found)
    assert len(found) == 1 or prompts * copies > most


def test_what_is_too_much_for_one_batch_is_several(
    model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy, drawn = Sampling(max_new_tokens=6, temperature=0), Sampling(max_new_tokens=6, temperature=1.0, num_return_sequences=5)
    whole = complete(model, words, PROMPTS, greedy)[0]
    sizes, real = [], model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **given: sizes.append(given["num_return_sequences"]) or real(ids, **given))
    monkeypatch.setattr(sampler, "BATCH_POSITIONS", 2 * (max(map(len, PROMPTS)) + 6))
    assert complete(model, words, PROMPTS, greedy)[0] == whole and sizes == [1, 1]
    found = complete(model, words, PROMPTS[:2], drawn)[0]
    assert [one.prompt for one in found] == [0] * 5 + [1] * 5 and sizes[2:] == [2, 2, 1, 2, 2, 1]
    assert len({one.text for one in found[:5]}) > 1


def test_greedy_is_the_likeliest_token_each_time(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    ids = list(PROMPTS[1])
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    ((one,), _) = complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=8, temperature=0))
    expected = ids[7:]
    end = expected.index(5) if 5 in expected else 8
    assert one.text.split() == [f"w{i}" for i in expected[:end]]


def test_sequences_differ_and_the_seed_repeats_them(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_p=1.0, num_return_sequences=3, seed=7)
    first, second = (complete(model, words, PROMPTS, sampling)[0] for _ in range(2))
    assert [one.text for one in first] == [one.text for one in second] and [one.prompt for one in first] == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]
    assert len({one.text for one in first[:3]}) > 1


def test_min_p_and_top_k_leave_out_the_unlikely(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    """With limits that leave one token, drawing is greedy."""
    greedy = complete(model, words, PROMPTS, Sampling(max_new_tokens=12, temperature=0))[0]
    for limit in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-9}):
        drawn = complete(model, words, PROMPTS, Sampling(max_new_tokens=12, **{"temperature": 1.0, "top_p": 1.0, **limit}))[0]
        assert [one.text for one in drawn] == [one.text for one in greedy], limit
    free = complete(model, words, PROMPTS, Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0))[0]
    assert [one.text for one in free] != [one.text for one in greedy]


def test_a_repetition_penalty_is_not_for_the_padding(
    model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The padding is the end token: prompts that were not the longest of their batch ended later than alone."""
    sampling = Sampling(max_new_tokens=20, temperature=0, repetition_penalty=1.5)
    alone = complete(model, words, [PROMPTS[0]], sampling)[0][0]
    said = [int(word[1:]) for word in alone.text.split()]
    monkeypatch.setattr(model.config, "eos_token_id", next(token for token in said if token not in PROMPTS[0] + PROMPTS[1]))
    ended, batch = complete(model, words, [PROMPTS[0]], sampling)[0][0], complete(model, words, PROMPTS, sampling)[0][0]
    assert (batch.text, batch.finish) == (ended.text, ended.finish) and ended.finish == "eos"


def test_a_repetition_penalty_stops_repeating(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    penalised = complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=12, temperature=0, repetition_penalty=1e5))[0][0]
    made = penalised.text.split()
    assert len(set(made)) == len(made) and not set(made) & {f"w{i}" for i in PROMPTS[1]}


def test_reasons_to_end(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    ((whole,), _) = complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=6, temperature=0))
    assert whole.finish == "length" and whole.tokens == 6
    third = whole.text.split()[2]
    ((stopped,), _) = complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=6, temperature=0, stop=(third,)))
    assert stopped.finish == "stop" and whole.text.startswith(stopped.text) and third not in stopped.text
    assert stopped.tokens == whole.text.split().index(third) + 1
    in_a_batch = complete(model, words, PROMPTS, Sampling(max_new_tokens=6, temperature=0, stop=(third,)))[0]
    assert in_a_batch[1] == replace(stopped, prompt=1) and in_a_batch[0].tokens == 6  # it was padded, which counts for nothing
    model.config.eos_token_id = [int(third[1:]), 96]
    ((ended,), _) = complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=6, temperature=0))
    model.config.eos_token_id = 5
    assert ended.finish == "eos" and ended.tokens == whole.text.split().index(third) + 1


def test_the_least_temperature_draws_the_likeliest(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    for limit in ({}, {"top_k": 10**6}, {"top_p": 1e-9}):
        coldest = Sampling(max_new_tokens=6, **{"temperature": LEAST_TEMPERATURE, "top_p": 1.0, **limit})
        drawn, likeliest = (complete(model, words, PROMPTS, s)[0] for s in (coldest, Sampling(max_new_tokens=6, temperature=0)))
        assert [one.text for one in drawn] == [one.text for one in likeliest]


def test_padding_stands_on_the_left() -> None:
    ids, mask = left_padded([[1, 2], [3, 4, 5]], 3, pad=9)
    assert ids.tolist() == [[9, 1, 2], [3, 4, 5]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},  # logits over it are infinite
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e6},
        {"num_return_sequences": 0},
        {"seed": 1 << 63},
        {"seed": -(1 << 63) - 1},
    ],
    ids=str,
)
def test_limits_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"--{name} must be"):
        Sampling(**wrong)


def test_equal_sequences_are_not_made_many_times() -> None:
    with pytest.raises(UserError, match="needs --temperature above 0"):
        Sampling(temperature=0, num_return_sequences=2)


def test_each_copy_of_a_prompt_has_its_own_padding() -> None:
    padded = torch.tensor([[True, False], [False, False]])
    ids = torch.tensor([[5, 7]] * 4)  # 5: the end token, which pads the first prompt and is said in the second
    scores = TextPenalty(2.0, padded, copies=2)(ids, torch.ones(4, 9))
    assert scores[:, 7].tolist() == [0.5] * 4 and scores[:, 5].tolist() == [1, 1, 0.5, 0.5]


def test_new_text_is_read_behind_its_own_prompt(
    model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an added token it begins with a blank, behind another not."""
    read: list[int] = []

    class Text:
        def __init__(self, _: Any) -> None: ...

        def of(self, ids: list[int], *, last: int) -> str:
            read.append(last)
            return ""

    monkeypatch.setattr(sampler, "NewText", Text)
    complete(model, words, PROMPTS, Sampling(max_new_tokens=1, temperature=1.0, num_return_sequences=2))
    assert read == [13, 13, 46, 46, 7, 7]


def test_a_context_may_be_filled(model: MoEGPTForCausalLM) -> None:
    check_length(model, 1000, 24)


def test_too_long_a_prompt(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="beyond the model's 1024 positions"):
        complete(model, words, [[1] * 1000], Sampling(max_new_tokens=25))


def test_the_cache_is_used(model: MoEGPTForCausalLM, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GrowingCache] = []
    init = GrowingCache.__init__
    monkeypatch.setattr(GrowingCache, "__init__", lambda self: (made.append(self), init(self))[1])
    complete(model, words, [PROMPTS[1]], Sampling(max_new_tokens=9, temperature=0))
    assert len(made) == 1 and made[0].get_seq_length() >= 7
