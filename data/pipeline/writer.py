"""The one writer of a split: appends documents in order, cuts shards at a token budget, can be stopped and taken up anywhere.

An open shard is `.NAME.bin.tmp` and `.NAME.sizes.tmp` (int32 tokens of each document). `state()` makes both durable and says
how long they are; `SplitWriter(state=...)` cuts them back to that length, whatever was written after it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.cli import UserError
from data.files import hash_file, naming, replace_file, sync_file, sync_folder
from data.shards import index_bytes, shard_name


class SplitWriter:
    """Writes `folder/shard_NNNNNN.{bin,idx}`; a shard is closed by the document that fills `shard_tokens`."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        state = state or {"shards": [], "documents": 0, "tokens": 0, "text_bytes": 0, "open_text_bytes": 0}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.text_bytes: int = state["text_bytes"]
        self.documents, self.tokens, self.open_text_bytes = state["documents"], state["tokens"], state["open_text_bytes"]
        self.bin: IO[bytes] | None = None
        self.sizes: IO[bytes] | None = None
        self.named = False  # the names of both are on the disk
        folder.mkdir(parents=True, exist_ok=True)
        self._take_up()

    def _paths(self) -> tuple[Path, Path, Path, Path]:
        name = shard_name(len(self.shards))
        temporary = (self.folder / f".{name}.bin.tmp", self.folder / f".{name}.sizes.tmp")
        return *temporary, self.folder / f"{name}.bin", self.folder / f"{name}.idx"

    def _take_up(self) -> None:
        """Remove what the state does not know. A shard that was renamed after the state was saved becomes the open one again."""
        bin_tmp, sizes_tmp, bin_path, _ = self._paths()
        if self.documents and not bin_tmp.exists():
            os.replace(bin_path, bin_tmp)
        known = {f"{s['name']}{suffix}" for s in self.shards for suffix in (".bin", ".idx")}
        known |= {bin_tmp.name, sizes_tmp.name} if self.documents else set()
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()
        if self.documents:
            self._open()

    def _open(self) -> None:
        bin_tmp, sizes_tmp, _, _ = self._paths()
        self.named = False
        lengths = (self.tokens * np.dtype(self.dtype).itemsize, 4 * self.documents)
        opened = []
        for path, length in zip((bin_tmp, sizes_tmp), lengths, strict=True):
            file = open(path, "ab")  # noqa: SIM115 (kept open across calls)
            if file.tell() < length:
                raise UserError(f"{path} is shorter than the job's state says; remove the output folder and start again")
            file.truncate(length)
            opened.append(file)
        self.bin, self.sizes = opened

    def add(self, tokens: np.ndarray, sizes: np.ndarray, text_bytes: np.ndarray) -> bool:
        """Append documents: `tokens` back to back, `sizes` tokens and `text_bytes` bytes of each. True if a shard was closed."""
        closed = False
        ends = np.cumsum(sizes, dtype=np.int64)
        done = 0
        while done < len(sizes):
            before = int(ends[done - 1]) if done else 0
            # The first document with which the shard is full is its last one.
            upto = int(np.searchsorted(ends, before + self.shard_tokens - self.tokens)) + 1
            upto = min(upto, len(sizes))
            after = int(ends[upto - 1])
            self._append(tokens[before:after], sizes[done:upto], int(text_bytes[done:upto].sum()))
            done = upto
            if self.tokens >= self.shard_tokens:
                self.close_shard()
                closed = True
        return closed

    def _append(self, tokens: np.ndarray, sizes: np.ndarray, text_bytes: int) -> None:
        if self.bin is None or self.sizes is None:
            self._open()
        assert self.bin is not None and self.sizes is not None
        data = np.ascontiguousarray(tokens, dtype=np.dtype(self.dtype).newbyteorder("<")).data
        for file, written in ((self.bin, data), (self.sizes, sizes.astype("<i4").tobytes())):
            with naming(file.name):
                file.write(written)
        self.tokens += len(tokens)
        self.documents += len(sizes)
        self.open_text_bytes += text_bytes

    def close_shard(self) -> None:
        """Finish the open shard, if there is one: index beside it, both durable, then renamed."""
        if self.bin is None or self.sizes is None:
            return
        self._sync()
        self.bin.close()
        self.sizes.close()
        self.bin = self.sizes = None
        bin_tmp, sizes_tmp, bin_path, idx_path = self._paths()
        replace_file(idx_path, index_bytes(np.fromfile(sizes_tmp, "<i4"), self.dtype))
        # The checksum is of what was written, not of what was meant to be.
        size, digest = bin_tmp.stat().st_size, hash_file(bin_tmp)
        expected = self.tokens * np.dtype(self.dtype).itemsize
        if size != expected:
            raise UserError(f"{bin_tmp} has {size} bytes instead of {expected}: a write was lost")
        os.replace(bin_tmp, bin_path)
        sync_folder(self.folder)
        self.shards.append(
            {
                "name": bin_path.stem,
                "documents": self.documents,
                "tokens": self.tokens,
                "text_bytes": self.open_text_bytes,
                "bytes": size,
                "sha256": digest,
                "index_sha256": hash_file(idx_path),
            }
        )
        self.text_bytes += self.open_text_bytes
        self.documents = self.tokens = self.open_text_bytes = 0

    def _sync(self) -> None:
        for file in (self.bin, self.sizes):
            if file is not None:
                with naming(file.name):
                    sync_file(file)
        if self.bin is not None and not self.named:
            sync_folder(self.folder)  # a file that has its content on the disk may not have its name there yet
            self.named = True

    def state(self) -> dict[str, Any]:
        """Durable: what `SplitWriter(state=...)` needs to go on from exactly here."""
        self._sync()
        return {
            "shards": self.shards,
            "text_bytes": self.text_bytes,
            "documents": self.documents,
            "tokens": self.tokens,
            "open_text_bytes": self.open_text_bytes,
        }

    def forget(self) -> None:
        """The state was saved: sizes of closed shards are needed no more."""
        known = self._paths()[1]
        for path in self.folder.glob(".*.sizes.tmp"):
            if path != known:
                path.unlink()

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest; every shard must be closed."""
        assert self.bin is None
        totals = {key: sum(s[key] for s in self.shards) for key in ("documents", "tokens", "text_bytes")}
        return {**totals, "shards": self.shards}

    def close(self) -> None:
        """Close the handles of an open shard, after an error: what is not durable yet is lost anyway."""
        for file in (self.bin, self.sizes):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
