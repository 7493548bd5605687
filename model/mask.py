"""The attention mask: plain causal, causal inside packed documents, causal with padding, or one that the caller gives.

Worked out once per forward and shared by all layers. Shapes: B batch, S queries, L keys (cached ones included).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .layers import to_device


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Causal attention of the last S of L positions, restricted by documents or padding where these are given.

    document_BS: number of each token's document within its row (on the positions' device), or None where a row is one document.
    seqlens: length of every document of the batch, row after row (their sum is B * S); None without documents or with padding.
    cu_seqlens: int32 `[documents + 1]`, where each document begins in the flattened batch, as varlen kernels want it.
    padding_BL: False where a key is padding, or None where there is none.
    given_B1SL: the caller's own mask, True where a query may look at a key; it replaces causality and padding.
    """

    queries: int
    keys: int
    device: torch.device
    document_BS: Tensor | None = None
    seqlens: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None
    padding_BL: Tensor | None = None
    given_B1SL: Tensor | None = None

    @property
    def plain_causal(self) -> bool:
        """No restriction but causality, so a kernel's own causal flag (or none for one query) is enough."""
        restricted = (self.document_BS, self.seqlens, self.padding_BL, self.given_B1SL)
        return all(x is None for x in restricted) and self.queries in (1, self.keys)

    @property
    def varlen(self) -> bool:
        """Packed documents and nothing else: what a kernel with `cu_seqlens` computes."""
        return self.seqlens is not None and self.padding_BL is None

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document; the number of keys where there are none."""
        return max(self.seqlens) if self.seqlens else self.keys

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "AttentionMask":
        """By this name accelerate moves what it hands to the blocks of a model that lies on several GPUs."""
        device = torch.device(device)
        if device == self.device:
            return self
        tensors = {name: getattr(self, name) for name in ("cu_seqlens", "padding_BL", "given_B1SL")}
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items() if x is not None}
        return replace(self, device=device, **moved)

    @cached_property
    def allowed_B1SL(self) -> Tensor:
        """True where a query may look at a key. A query that may look at none sees itself: no softmax is empty."""
        key_L = torch.arange(self.keys, device=self.device)
        query_S = key_L[self.keys - self.queries :]
        itself_SL = key_L == query_S[:, None]
        if self.given_B1SL is not None:
            return _never_none(self.given_B1SL, itself_SL)
        allowed_B1SL = (key_L <= query_S[:, None])[None, None]
        if self.document_BS is not None:
            document_BS = to_device(self.document_BS, self.device)
            allowed_B1SL = allowed_B1SL & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
        if self.padding_BL is not None:
            allowed_B1SL = _never_none(allowed_B1SL & self.padding_BL[:, None, None, :], itself_SL)
        return allowed_B1SL


def _never_none(allowed_B1SL: Tensor, itself_SL: Tensor) -> Tensor:
    """The same, and itself for a query that may look at none."""
    return allowed_B1SL | (itself_SL & ~allowed_B1SL.any(dim=-1, keepdim=True))


def causal_mask(
    shape: tuple[int, int],
    past: int,
    device: torch.device,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cached: bool = False,
) -> AttentionMask:
    """For `shape` = (batch, queries) after `past` cached positions: packed documents are read off `position_ids`, padding
    off a Hugging Face `attention_mask`.

    position_ids `[1 or B, S]`: a document begins wherever a position is not its left neighbour's plus one, and after padding
    where it is no later than the last before that. They may lie on the host, and there they are better: where documents begin is
    then known without waiting for the device.
    attention_mask `[B, L]`: 0 marks padding; or `[B or 1, 1, S, L]`, bool or added to the scores (0 or very negative).
    Columns beyond L are a static cache's free slots, where the caller has one (`cached`, or there is a past). Raises ValueError
    for a mask of another shape or other values, and for documents that begin among several positions after cached ones; a single
    position, of which a generation has one a token, is not looked at.
    """
    queries = shape[1]
    keys = past + queries
    padding_BL = None
    if attention_mask is not None and attention_mask.shape[-1] > keys and not (cached or past):
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns for {keys} keys, and no cache has the others")
    if attention_mask is not None and attention_mask.dim() == 4:
        return AttentionMask(queries=queries, keys=keys, device=device, given_B1SL=_allowed(attention_mask, queries, keys))
    if attention_mask is not None:
        padding_BL = _padding(attention_mask, keys)
    document_BS = None
    if position_ids is not None and past == 0:
        document_BS = _documents(position_ids, shape, padding_BL)
    elif position_ids is not None and queries > 1:
        _check_goes_on(position_ids, past, padding_BL)
    seqlens = None if document_BS is None or padding_BL is not None else _seqlens(document_BS)
    cu_seqlens = None if seqlens is None else to_device(torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32), device)
    return AttentionMask(
        queries=queries,
        keys=keys,
        device=device,
        document_BS=document_BS,
        seqlens=seqlens,
        cu_seqlens=cu_seqlens,
        padding_BL=padding_BL,
    )


def _padding(attention_mask_BL: Tensor, keys: int) -> Tensor | None:
    """The mask as bools, or None where nothing is padded."""
    if attention_mask_BL.dim() != 2 or attention_mask_BL.shape[1] < keys:
        raise ValueError(
            f"attention_mask must be [batch, {keys} keys], 0 for padding, or [batch, 1, queries, keys]; "
            f"got {tuple(attention_mask_BL.shape)}"
        )
    keep_BL = attention_mask_BL[:, :keys].bool()
    return None if bool(keep_BL.all()) else keep_BL


def _allowed(mask_B1SL: Tensor, queries: int, keys: int) -> Tensor:
    """A 4-D mask as bools. Numbers are what transformers adds to the scores: 0 to look, its dtype's lowest or -inf not to."""
    if mask_B1SL.shape[1] != 1 or mask_B1SL.shape[2] != queries or mask_B1SL.shape[3] < keys:
        raise ValueError(f"a 4-D attention_mask must be [batch, 1, {queries} queries, {keys} keys]; got {tuple(mask_B1SL.shape)}")
    mask_B1SL = mask_B1SL[..., :keys]
    if mask_B1SL.dtype == torch.bool:
        return mask_B1SL
    allowed_B1SL = mask_B1SL == 0
    if not mask_B1SL.is_floating_point() or bool((mask_B1SL[~allowed_B1SL] > -1e4).any()):
        raise ValueError("a 4-D attention_mask must be bool, or 0 and the dtype's lowest number: this model adds no bias to scores")
    return allowed_B1SL


def _documents(position_ids: Tensor, shape: tuple[int, int], padding_BL: Tensor | None) -> Tensor | None:
    """Number of each token's document `[B, S]`, or None where no position restarts."""
    restarts = _restarts(position_ids, padding_BL)
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.cumsum(1), (1, 0)).expand(shape)


def _check_goes_on(position_ids: Tensor, past: int, padding_BL: Tensor | None) -> None:
    """Raises ValueError where a document begins after `past` cached positions. transformers' own models look for documents only
    where there is no cache, and beside one let each token see all that was before, of whatever document."""
    begins = position_ids == 0
    if padding_BL is not None:  # which may have any position, and after which alone a row does begin
        padding_BL = padding_BL.to(position_ids.device)
        begins = begins & padding_BL[:, past:] & padding_BL[:, :past].any(dim=1, keepdim=True)
        padding_BL = padding_BL[:, past:]
    if bool(begins.any()) or bool(_restarts(position_ids, padding_BL).any()):
        raise ValueError(
            f"position_ids restart after {past} cached positions, and a cache does not say of which document these are; "
            "give packed documents without past_key_values"
        )


def _restarts(position_ids: Tensor, keep_BS: Tensor | None) -> Tensor:
    """True at each position but the first that does not go on from the one before."""
    if keep_BS is None:
        return position_ids[:, 1:] != position_ids[:, :-1] + 1
    return _restarts_beside_padding(position_ids, keep_BS.to(position_ids.device))


def _restarts_beside_padding(position_ids: Tensor, keep_BS: Tensor) -> Tensor:
    """Those of kept positions: padding may have any, as `generate` gives it. Over a gap they may count the padding or not."""
    positions_BS, keep_BS = torch.broadcast_tensors(position_ids, keep_BS)
    last_kept_BS = torch.where(keep_BS, torch.arange(keep_BS.shape[1], device=keep_BS.device), 0).cummax(1).values
    here, before = positions_BS[:, 1:], positions_BS.gather(1, last_kept_BS)[:, :-1]
    restarts = torch.where(keep_BS[:, :-1], here != before + 1, here <= before)
    had_any = keep_BS.cumsum(1)[:, :-1] > 0
    return restarts & had_any & keep_BS[:, 1:]


def _seqlens(document_BS: Tensor) -> tuple[int, ...]:
    """Length of every document. The host waits for it where the positions are on a GPU."""
    starts_BS = torch.ones_like(document_BS, dtype=torch.bool)
    starts_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    ends = [*torch.nonzero(starts_BS.flatten()).flatten().tolist(), starts_BS.numel()]
    return tuple(end - start for start, end in pairwise(ends))
