"""What the attention mask makes of positions, padding and masks that a caller gives."""

from contextlib import nullcontext

import pytest
import torch

from model.mask import AttentionMask, causal_mask
from tests import reference

CPU = torch.device("cpu")
LOWEST = torch.finfo(torch.float32).min


def test_what_needs_no_mask_is_plain_causal() -> None:
    assert causal_mask((2, 8), 0, CPU).plain_causal
    assert causal_mask((2, 8), 0, CPU, attention_mask=torch.ones(2, 8)).plain_causal
    assert causal_mask((2, 8), 0, CPU, position_ids=torch.arange(8)[None]).plain_causal
    assert causal_mask((2, 1), 7, CPU).plain_causal
    assert not causal_mask((2, 3), 5, CPU).plain_causal
    assert not causal_mask((2, 8), 0, CPU, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool)).plain_causal


def test_documents_are_read_off_the_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    packed = causal_mask((2, 8), 0, CPU, position_ids=positions)
    assert packed.varlen and packed.seqlens == (3, 5, 6, 2) and packed.max_seqlen == 6
    assert packed.cu_seqlens is not None and packed.cu_seqlens.tolist() == [0, 3, 8, 14, 16]
    assert packed.cu_seqlens.dtype == torch.int32
    assert torch.equal(packed.allowed_B1SL[:, 0], reference.allowed_pairs(positions))


@pytest.mark.parametrize(
    ("positions", "keep", "documents"),
    [
        ([0, 1, 2, 0, 1, 2, 3, 4], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, None, None]),  # a packed row, filled up
        ([0, 1, 2, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, None, None, None]),
        ([1, 1, 1, 0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1, 1, 1], [None] * 3 + [0] * 5),  # what `generate` makes on the left
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 1, 1, 1, 1], [None] * 3 + [0] * 5),
        ([1, 1, 0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1], [None, None, 0, 0, 0, 1, 1, 1]),
        ([0, 1, 2, 9, 0, 1, 2, 3], [1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, None, 1, 1, 1, 1]),  # each document filled up
        ([0, 9, 0, 1, 2, 3, 4, 5], [1, 0, 1, 1, 1, 1, 1, 1], [0, None, 1, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 0, None, None, 0, 0, 0]),  # a gap that is counted
        ([0, 1, 2, 9, 9, 3, 4, 5], [1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 0, None, None, 0, 0, 0]),  # and one that is not
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_documents_beside_padding(positions: list[int], keep: list[int], documents: list[int | None], shared: bool) -> None:
    """In a batch whose other row is whole; `shared`: of one row of positions."""
    both = torch.tensor([positions] if shared else [positions, list(range(8))])
    mask = causal_mask((2, 8), 0, CPU, position_ids=both, attention_mask=torch.tensor([keep, [1] * 8]))
    for query, mine in enumerate(documents):
        expected = [document == mine and key <= query for key, document in enumerate(documents)]
        assert mine is None or mask.allowed_B1SL[0, 0, query].tolist() == expected
    if not shared:
        assert torch.equal(mask.allowed_B1SL[1, 0], torch.ones(8, 8).bool().tril())
        assert (mask.document_BS is None) == (1 not in documents)
    assert not mask.varlen and not mask.plain_causal


def test_one_row_of_positions_serves_the_batch() -> None:
    packed = causal_mask((2, 8), 0, CPU, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    assert packed.seqlens == (3, 5, 3, 5)


def test_one_row_of_padding_serves_the_batch() -> None:
    positions = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]])
    mask = causal_mask((2, 4), 0, CPU, position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 1, 0]])[:, 1:])
    assert mask.document_BS is None  # the last position is padding
    mask = causal_mask((2, 4), 0, CPU, position_ids=positions, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert mask.document_BS is not None and mask.document_BS.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_query_that_may_see_nothing_sees_itself() -> None:
    padding = torch.zeros(1, 4, dtype=torch.bool)
    padded = AttentionMask(queries=4, keys=4, device=CPU, padding_BL=padding)
    assert torch.equal(padded.allowed_B1SL[0, 0], torch.eye(4, dtype=torch.bool))
    given = AttentionMask(queries=4, keys=4, device=CPU, given_B1SL=padding[:, None, None].expand(1, 1, 4, 4))
    assert torch.equal(given.allowed_B1SL[0, 0], torch.eye(4, dtype=torch.bool))


def test_padding_of_a_static_cache_is_read_from_its_beginning() -> None:
    """Columns beyond the keys are free slots."""
    keep = torch.ones(1, 8)
    keep[0, 0] = 0
    padding_BL = causal_mask((1, 3), 2, CPU, attention_mask=keep).padding_BL
    assert padding_BL is not None and padding_BL.tolist() == [[False, True, True, True, True]]


GOES_ON = [
    ([[5, 6, 7]], None, True),
    ([[5, 6, 0]], None, False),
    ([[0, 1, 2]], None, False),
    ([[105, 106, 107]], None, True),  # an offset of the caller's
    ([[5, 6, 9]], None, False),
    ([[5, 6, 7], [3, 4, 5]], [[1] * 8, [0, 0, *[1] * 6]], True),
    ([[5, 6, 7], [0, 1, 2]], [[1] * 8, [0] * 5 + [1] * 3], True),  # of the second nothing came before
    ([[5, 6, 7], [1, 5, 6]], [[1] * 8, [*[1] * 5, 0, 1, 1]], True),
    ([[5, 6, 7], [0, 5, 6]], [[1] * 8, [*[1] * 5, 0, 1, 1]], True),  # padding has any position
    ([[5, 6, 7], [5, 0, 1]], [[1] * 8, [*[1] * 5, 1, 1, 1]], False),
    ([[5, 6, 7], [1, 0, 1]], [[1] * 8, [*[1] * 5, 0, 1, 1]], False),
    ([[0, 1, 2]], [[0, *[1] * 7]], False),
]


@pytest.mark.parametrize(("positions", "keep", "goes_on"), GOES_ON)
def test_a_document_does_not_begin_after_cached_positions(positions: list, keep: list | None, goes_on: bool) -> None:
    given = {} if keep is None else {"attention_mask": torch.tensor(keep)}
    refused = pytest.raises(ValueError, match="position_ids restart after 5 cached positions")
    with nullcontext() if goes_on else refused:
        causal_mask((len(positions), 3), 5, CPU, position_ids=torch.tensor(positions), **given)


def test_a_mask_of_four_dimensions_is_the_callers_word() -> None:
    """As bools or as what transformers adds to the scores; a static cache's free slots are cut off."""
    allowed = torch.rand(2, 1, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed[0, 0, 1] = False
    expected = allowed[..., :5].clone()
    expected[0, 0, 1, 3] = True  # the second of the last three of five positions
    added = torch.where(allowed, 0.0, LOWEST)
    for mask in (allowed, added, torch.where(allowed, 0.0, -torch.inf)):
        made = causal_mask((2, 3), 2, CPU, attention_mask=mask)
        assert not made.plain_causal and not made.varlen
        assert torch.equal(made.allowed_B1SL, expected)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
        {"attention_mask": torch.rand(1, 1, 5, 5) < 0.5},
    ],
)
def test_accelerate_moves_it_with_what_else_a_block_gets(given: dict[str, torch.Tensor]) -> None:
    """Blocks of one model on several GPUs; here the second device is one without data."""
    operations = pytest.importorskip("accelerate.utils.operations")
    mask = causal_mask((1, 5), 0, CPU, **given)
    moved = operations.send_to_device({"mask": mask}, "meta")["mask"]
    assert moved.device.type == moved.allowed_B1SL.device.type == "meta"
    assert moved.cu_seqlens is None or moved.cu_seqlens.device.type == "meta"
    assert moved.seqlens == mask.seqlens and moved.allowed_B1SL.shape == mask.allowed_B1SL.shape
    assert operations.send_to_device({"mask": mask}, "cpu")["mask"] is mask  # and with it the tensor that all layers share


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(2, 9), "attention_mask has 9 columns for 8 keys, and no cache has the others"),
        (torch.ones(2, 1, 8, 9, dtype=torch.bool), "attention_mask has 9 columns for 8 keys"),
        (torch.ones(2, 4), "attention_mask must be"),  # fewer keys than positions
        (torch.ones(2, 1, 8), "attention_mask must be"),
        (torch.ones(2, 1, 4, 8), "4-D attention_mask must be"),
        (torch.ones(2, 4, 8, 8), "4-D attention_mask must be"),
        (torch.full((2, 1, 8, 8), -1.5), "adds no bias"),
        (torch.tensor([0.0, -1.5] + [LOWEST] * 6).expand(2, 1, 8, 8), "adds no bias"),
        (torch.ones(2, 1, 8, 1, dtype=torch.bool), "4-D attention_mask must be"),
        (torch.ones(2, 1, 8, 8, dtype=torch.long), "must be bool"),
    ],
)
def test_other_masks_are_refused(mask: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        causal_mask((2, 8), 0, CPU, attention_mask=mask)
