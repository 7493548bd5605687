"""Packed training samples from shards: `ds[i]` and `ds.batch(indices)` are pure functions of (content, seed, index).

A split is one long stream of tokens; sample i is tokens [i*T, i*T+T] of it (T inputs and their targets, one token shared with
the next sample). Training order: epoch = i // len, permuted within the epoch without any table. A position in the data is one
integer, the number of samples consumed, whatever the number of ranks.

Shape legend: B samples, T tokens of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cli import UserError
from data.order import blend_slots, earlier_slots, permute_epochs
from data.stream import TokenStream

IGNORED = -100  # the target that torch's cross entropy leaves out
#: Sample numbers whose places are computed together and kept.
LOCATED_AT_ONCE = 1024

Sourcelike = str | Path | tuple[str | Path, float]


class PackedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of one split of one or more shard folders.

    sources: folders, or (folder, weight). Without weights every sample of every folder comes once an epoch; with weights the shares
        are exact over each period of the blend (0.7 and 0.3: 7 and 3 of every 10 samples), and a folder that runs out starts
        its next epoch.
    document_mask: adds `position_ids` that restart in each document, and no target crosses into the next document.
    The validation split is read without weights, always the same: each folder in order, all of them in proportion to their sizes,
        so that the first samples stand for all.

    Raises NotFound for a missing folder or shard, UserError for damage, mixed tokenizers, a bad weight, or a split shorter than
    one sample.
    """

    def __init__(
        self,
        sources: Sequence[Sourcelike],
        *,
        split: str,
        sequence_length: int,
        seed: int = 0,
        document_mask: bool = False,
    ) -> None:
        if split not in ("train", "validation"):
            raise UserError(f"split must be train or validation, not {split}")
        if sequence_length < 1:
            raise UserError(f"sequence_length must be at least 1, not {sequence_length}")
        if not sources:
            raise UserError("no shards given")
        self.split, self.sequence_length, self.seed, self.document_mask = split, sequence_length, seed, document_mask
        folders, weights = _folders_and_weights(sources)
        self.streams = [TokenStream(folder, split) for folder in folders]
        self.weights = weights if split == "train" else None
        self._check_tokenizers()
        self.samples = np.array([max(s.tokens - 1, 0) // sequence_length for s in self.streams], np.int64)
        self._check_lengths()
        self.ends = np.cumsum(self.samples)
        #: Which source each slot of a blend's period takes, and how many earlier slots took the same one.
        self.slots = blend_slots(self.weights) if self.weights else None
        self.earlier = earlier_slots(self.slots) if self.slots is not None else None
        self.validation_order = interleaved(self.samples) if split == "validation" and len(self.streams) > 1 else None
        self._located: tuple[int, np.ndarray, np.ndarray] | None = None

    def _check_tokenizers(self) -> None:
        first = self.streams[0]
        for other in self.streams[1:]:
            if other.manifest["tokenizer"]["fingerprint"] != first.manifest["tokenizer"]["fingerprint"]:
                raise UserError(
                    f"{other.folder} was made with tokenizer {other.manifest['tokenizer']['name']} and {first.folder} with "
                    f"{first.manifest['tokenizer']['name']}: shards of one run must have the same tokenizer"
                )
            ends = [s.manifest["tokenizer"]["eos_token_id"] for s in (other, first)]
            if ends[0] != ends[1]:  # one tokenizer.json, and two configurations beside it that name its end of text
                raise UserError(
                    f"documents end with token {ends[0]} in {other.folder} and with {ends[1]} in {first.folder}: preprocess one of "
                    "them again with the other's tokenizer folder"
                )

    def _check_lengths(self) -> None:
        short = self.too_short
        if short and (self.weights or len(short) == len(self.streams)):
            s = short[0]
            raise UserError(
                f"the {self.split} split of {s.folder} has {s.tokens} tokens, a sample of {self.sequence_length} needs "
                f"{self.sequence_length + 1}; give more data, a larger --validation_fraction or a shorter --sequence_length"
            )

    def __len__(self) -> int:
        """Samples of one epoch. Of a weighted blend: until the first folder, in proportion to its weight, is used up."""
        if self.slots is None:
            return int(self.ends[-1])
        counts = np.bincount(self.slots, minlength=len(self.streams))
        return int((self.samples * len(self.slots) // counts).min())

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [B], sample in that source [B]) of sample numbers [B]."""
        if (indices < 0).any():
            raise IndexError("sample numbers start at 0")
        if self.split == "validation" or not len(indices):
            return self._locate(indices)
        # Training asks for consecutive numbers: the arithmetic for a thousand costs little more than for a batch of sixteen.
        number = int(indices[0]) // LOCATED_AT_ONCE
        first = number * LOCATED_AT_ONCE
        if (indices // LOCATED_AT_ONCE != number).any():
            return self._locate(indices)
        located = self._located
        if located is None or located[0] != number:
            located = self._located = number, *self._locate(np.arange(first, first + LOCATED_AT_ONCE))
        _, source, sample = located
        return source[indices - first], sample[indices - first]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.slots is not None and self.earlier is not None:
            period, slot = np.divmod(indices, len(self.slots))
            source = self.slots[slot]
            local = period * np.bincount(self.slots, minlength=len(self.streams))[source] + self.earlier[slot]
            out = np.empty_like(indices)
            for k in np.unique(source):
                chosen = source == k
                out[chosen] = permute_epochs(local[chosen], int(self.samples[k]), self.seed + int(k))
            return source, out
        total = int(self.ends[-1])
        if self.split == "validation":
            if (indices >= total).any():
                raise IndexError(f"the validation split has {total} samples")
            where = indices if self.validation_order is None else self.validation_order[indices]
        else:
            where = permute_epochs(indices, total, self.seed)
        source = np.searchsorted(self.ends, where, "right")
        return source, where - (self.ends - self.samples)[source]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.batch([index]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids, shift_labels and, with document_mask, position_ids of those samples: int64 [B, T] each."""
        numbers = np.asarray(indices, np.int64).reshape(-1)
        source, sample = self.locate(numbers)
        length = self.sequence_length
        tokens_BT1 = self._gather(source, sample * length)
        self._check_ids(tokens_BT1, source)
        found = {
            "input_ids": torch.from_numpy(tokens_BT1[:, :-1].astype(np.int64)),
            "shift_labels": torch.from_numpy(tokens_BT1[:, 1:].astype(np.int64)),
        }
        if self.document_mask:
            self._mask(found, source, sample)
        return found

    def count_targets(self, indices: Sequence[int] | np.ndarray) -> int:
        """How many tokens of those samples have a target: all, but for the last of a document with document_mask.

        From the index alone, so that every rank can count a whole global batch without its tokens or the other ranks.
        """
        numbers = np.asarray(indices, np.int64).reshape(-1)
        targets = len(numbers) * self.sequence_length
        if self.document_mask:
            for k, i in zip(*(places.tolist() for places in self.locate(numbers)), strict=True):
                starts = self.streams[k].document_starts(i * self.sequence_length, self.sequence_length + 1)
                targets -= int((starts > 0).sum())
        return targets

    def _gather(self, source: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """[B, T + 1] in the shards' dtype: half the memory traffic of gathering int64."""
        tokens_BT1 = np.empty((len(starts), self.sequence_length + 1), self.streams[0].dtype)
        if len(self.streams) == 1:
            self.streams[0].gather(starts, tokens_BT1)
            return tokens_BT1
        for k in np.unique(source).tolist():
            rows = np.flatnonzero(source == k)
            part = np.empty((len(rows), self.sequence_length + 1), tokens_BT1.dtype)
            self.streams[k].gather(starts[rows], part)
            tokens_BT1[rows] = part
        return tokens_BT1

    def _check_ids(self, tokens_BT1: np.ndarray, source: np.ndarray) -> None:
        """Shards are not verified when they are opened; a GPU would answer an id past the embedding with a device-side assert."""
        unsigned_BT1 = tokens_BT1.view(f"u{tokens_BT1.itemsize}")  # a negative id is then one past every vocabulary: one pass
        if unsigned_BT1.size and int(unsigned_BT1.max()) >= self.vocab_size:
            wrong = unsigned_BT1 >= self.vocab_size
            row = int(np.argmax(wrong.any(1)))
            folder = self.streams[int(source[row])].folder
            raise UserError(
                f"the {self.split} split of {folder} holds a token {int(tokens_BT1[row][wrong[row]][0])}, the vocabulary has "
                f"{self.vocab_size}: it is damaged; python data/verify.py {folder} says where"
            )

    def _mask(self, batch: dict[str, torch.Tensor], source: np.ndarray, sample: np.ndarray) -> None:
        length = self.sequence_length
        positions_BT = np.empty((len(source), length), np.int64)
        steps_T = np.arange(length)
        for row, (k, i) in enumerate(zip(source.tolist(), sample.tolist(), strict=True)):
            starts = self.streams[k].document_starts(i * length, length + 1)
            starts = starts[starts > 0]
            batch["shift_labels"][row, torch.from_numpy(starts - 1)] = IGNORED
            inside = starts[starts < length]
            # Of a document that began in an earlier sample nothing can be seen here: it counts from this sample's start.
            begins = np.zeros(length, np.int64)
            begins[inside] = inside
            positions_BT[row] = steps_T - np.maximum.accumulate(begins)
        batch["position_ids"] = torch.from_numpy(positions_BT)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what sample i is, besides seed and split sizes: content, order of folders, weights, length."""
        facts = [s.fingerprint for s in self.streams]
        order = self.weights if self.validation_order is None else "interleaved"
        return hashlib.sha256(repr((facts, order, self.sequence_length)).encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.streams[0].manifest["tokenizer"]["fingerprint"])

    @property
    def tokenizer_folder(self) -> Path:
        """`PreTrainedTokenizerFast.from_pretrained(folder)` loads it with the ids of these shards."""
        return self.streams[0].folder / "tokenizer"

    @property
    def vocab_size(self) -> int:
        return int(self.streams[0].manifest["tokenizer"]["vocab_size"])

    @property
    def eos_token_id(self) -> int:
        return int(self.streams[0].manifest["tokenizer"]["eos_token_id"])

    @property
    def tokens(self) -> int:
        """Input tokens of one epoch."""
        return len(self) * self.sequence_length

    @property
    def too_short(self) -> list[TokenStream]:
        """Of several folders those of which nothing is read: they hold less than one sample."""
        return [stream for stream, samples in zip(self.streams, self.samples, strict=True) if not samples]

    def text_bytes_per_token(self, samples: int | None = None) -> float:
        """UTF-8 bytes of text a token (end of text counted): bits per byte are nats per token over this and ln 2.

        Of the whole split, or of its first samples: of each folder by how many of them are its.
        """
        if samples is None:
            return sum(s.text_bytes for s in self.streams) / sum(s.tokens for s in self.streams)
        source, _ = self.locate(np.arange(samples))
        counts = np.bincount(source, minlength=len(self.streams)).tolist()
        return float(sum(n / samples * s.text_bytes / s.tokens for s, n in zip(self.streams, counts, strict=True) if n))

    def describe(self) -> dict[str, Any]:
        """For a run's config.json."""
        return {
            "split": self.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "document_mask": self.document_mask,
            "sources": [str(s.folder) for s in self.streams],
            "weights": self.weights,
            "samples": len(self),
            "tokens": [s.tokens for s in self.streams],
            "fingerprint": self.fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }


def interleaved(samples: np.ndarray) -> np.ndarray:
    """Numbers of the samples of several folders, laid end to end, in an order of which every beginning has its share of each."""
    share = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in samples.tolist()])
    return np.argsort(share, kind="stable")


def _folders_and_weights(sources: Sequence[Sourcelike]) -> tuple[list[Path], list[float] | None]:
    folders = [Path(s[0]) if isinstance(s, tuple) else Path(s) for s in sources]
    given = [s[1] if isinstance(s, tuple) else None for s in sources]
    weights = [w for w in given if w is not None]
    if not weights:
        return folders, None
    if len(weights) < len(folders):
        raise UserError("give every shard folder a weight (DIR:WEIGHT), or none")
    if not all(0.001 <= w < 1e6 for w in weights):
        raise UserError(f"weights must be from 0.001 up, not {weights}")
    return folders, weights
