"""Which keys a query sees: plain causal, causal inside packed documents, or causal with padding.

Worked out once per forward and shared by all layers. Shapes: B batch, S queries, L keys (cached ones included).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Causal attention of the last S of L positions, restricted by documents or padding where these are given.

    document_BS: number of each token's document within its row, or None where a row is one document.
    padding_BL: False where a key is padding, or None where there is none.
    """

    queries: int
    keys: int
    device: torch.device
    document_BS: Tensor | None = None
    padding_BL: Tensor | None = None

    @property
    def plain_causal(self) -> bool:
        """No restriction but causality, so a kernel's own causal flag (or none for one query) is enough."""
        return self.document_BS is None and self.padding_BL is None and self.queries in (1, self.keys)

    @cached_property
    def mask_B1SL(self) -> Tensor:
        """True where a query may look at a key. A query always sees itself, so no row of the softmax is empty."""
        key_L = torch.arange(self.keys, device=self.device)
        query_S = key_L[self.keys - self.queries :]
        mask = (key_L <= query_S[:, None])[None, None]
        if self.document_BS is not None:
            mask = mask & (self.document_BS[:, None, :, None] == self.document_BS[:, None, None, :])
        if self.padding_BL is not None:
            itself = key_L == query_S[:, None]
            mask = mask & (self.padding_BL[:, None, None, :] | itself)
        return mask

    @cached_property
    def lengths(self) -> tuple[int, ...] | None:
        """Length of every document of the batch, row after row (their sum is B * S); None without documents."""
        if self.document_BS is None:
            return None
        starts = torch.ones_like(self.document_BS, dtype=torch.bool)
        starts[:, 1:] = self.document_BS[:, 1:] != self.document_BS[:, :-1]
        ends = [*torch.nonzero(starts.flatten()).flatten().tolist(), starts.numel()]  # the one host synchronisation
        return tuple(end - start for start, end in pairwise(ends))

    @cached_property
    def cumulative_lengths(self) -> Tensor | None:
        """int32 `[documents + 1]`: where each document begins in the flattened batch, as varlen kernels want it."""
        if self.lengths is None:
            return None
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)


def visibility(
    shape: tuple[int, int],
    past: int,
    device: torch.device,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Visibility:
    """For `shape` = (batch, queries) after `past` cached positions: packed documents are read off `position_ids`, padding
    off a Hugging Face `attention_mask`.

    position_ids `[1 or B, S]`: a document begins wherever a position is not its left neighbour's plus one.
    attention_mask `[B, L]`: 0 marks padding. Raises ValueError for one of another rank.
    """
    padding_BL = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, keys], 0 for padding; got {tuple(attention_mask.shape)}")
        keep = attention_mask.bool()
        padding_BL = None if bool(keep.all()) else keep
    document_BS = None
    if position_ids is not None and past == 0 and padding_BL is None:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if bool(restarts.any()):
            document_BS = torch.nn.functional.pad(restarts.cumsum(1), (1, 0)).expand(shape)
    return Visibility(shape[1], past + shape[1], device, document_BS, padding_BL)
