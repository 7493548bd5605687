"""One split of one shard folder as a single long stream of tokens, memory-mapped: memory does not grow with the tokens."""

from __future__ import annotations

import errno
import hashlib
import mmap
import resource
import weakref
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError
from data.shards import check_shard, index_faults, load_manifest, read_index

#: Shards of one stream mapped at once, at most, up to two files each. A map keeps a file handle; mapping takes some 20 us.
OPEN_SHARDS = 96
#: All that are open in this process: they share its file handles.
_streams: weakref.WeakSet[TokenStream] = weakref.WeakSet()


class TokenStream:
    """Tokens [0, tokens) of `folder/split`. Structure and sizes of all shards are checked on opening, the checksums are not."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.manifest: dict[str, Any] = load_manifest(folder)
        entry = self.manifest["splits"][split]
        self.dtype: str = self.manifest["dtype"]
        self.shards: list[dict[str, Any]] = entry["shards"]
        for shard in self.shards:
            check_shard(folder, split, shard, self.dtype)
        counts = [s["tokens"] for s in self.shards]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self.tokens, self.text_bytes = int(self.starts[-1]), int(entry["text_bytes"])
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._offsets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sound: set[int] = set()  # shards whose index was verified
        _streams.add(self)

    @property
    def fingerprint(self) -> str:
        """Of the content: the tokenizer and the checksum of every shard."""
        checksums = [self.manifest["tokenizer"]["fingerprint"], self.dtype, *(s["sha256"] for s in self.shards)]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()

    def close(self) -> None:
        """Let go of all maps; what is read next is mapped anew."""
        self._maps.clear()
        self._offsets.clear()

    def _tokens(self, shard: int) -> np.ndarray:
        return _kept(self._maps, shard, self._map)

    def _map(self, shard: int) -> np.ndarray:
        path = (self.folder / self.split / self.shards[shard]["name"]).with_suffix(".bin")
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(view, np.dtype(self.dtype).newbyteorder("<"))

    def _document_offsets(self, shard: int) -> np.ndarray:
        return _kept(self._offsets, shard, self._map_offsets)

    def _map_offsets(self, shard: int) -> np.ndarray:
        """Verified whole the first time, 20 ns a document: from wrong offsets wrong masks would be trained on without a word."""
        path = (self.folder / self.split / self.shards[shard]["name"]).with_suffix(".idx")
        index = read_index(path)
        if shard not in self._sound:
            for fault in index_faults(path, index, self.shards[shard]["tokens"]):
                raise UserError(f"{fault}; it is damaged: preprocess again or restore it")
            self._sound.add(shard)
        return index.offsets

    def pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(shard, first token in it, how many) that make up tokens [start, start + count) of the stream."""
        found = []
        shard = int(np.searchsorted(self.starts, start, "right")) - 1
        while count > 0:
            first = start - int(self.starts[shard])
            here = min(count, int(self.starts[shard + 1]) - start)
            if here > 0:
                found.append((shard, first, here))
            start, count, shard = start + here, count - here, shard + 1
        return found

    def gather(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill rows of `out` [B, n], in the shards' dtype, with tokens [start, start + n) of each start (int64 [B])."""
        length = out.shape[1]
        shard = np.searchsorted(self.starts, starts, "right") - 1
        first = starts - self.starts[shard]
        inside = starts + length <= self.starts[shard + 1]
        for row, (k, i, whole) in enumerate(zip(shard.tolist(), first.tolist(), inside.tolist(), strict=True)):
            if whole:
                out[row] = self._tokens(k)[i : i + length]
            else:
                self.read(int(starts[row]), out[row])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` [n] with tokens [start, start + n), across shards where need be."""
        done = 0
        for shard, first, count in self.pieces(start, len(out)):
            out[done : done + count] = self._tokens(shard)[first : first + count]
            done += count

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """int64, ascending: where documents begin in tokens [start, start + count), relative to `start`. Reads only the index."""
        width = np.dtype(self.dtype).itemsize
        found, done = [], 0
        for shard, first, length in self.pieces(start, count):
            offsets = self._document_offsets(shard)
            # bisect, not searchsorted: the offsets are unaligned in the file, and numpy would copy them all.
            low = bisect_left(offsets, first * width)
            high = bisect_right(offsets, (first + length - 1) * width)
            found.append(offsets[low:high].astype(np.int64) // width - first + done)
            done += length
        return np.concatenate(found) if found else np.empty(0, np.int64)


def _kept(cache: OrderedDict[int, np.ndarray], shard: int, open_file: Callable[[int], np.ndarray]) -> np.ndarray:
    """Open a shard's file once and remember it. First in, first out: what was opened longest ago is closed when nobody uses it any
    more."""
    found = cache.get(shard)
    if found is not None:
        return found
    while len(cache) >= open_limit():
        cache.popitem(last=False)
    try:
        cache[shard] = open_file(shard)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        # Somebody else has taken the handles: give up all of ours and try once more.
        for stream in list(_streams):
            stream.close()
        cache[shard] = open_file(shard)
    return cache[shard]


def open_limit() -> int:
    """Files that each of a stream's two caches may hold: half of the process's handles are left to others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    handles = soft if soft != resource.RLIM_INFINITY else 1 << 20
    return max(min(OPEN_SHARDS, handles // (4 * max(len(_streams), 1))), 1)
