"""Near duplicates by MinHash and locality-sensitive hashing (rensa), in document order: of similar documents the first stays.

A document is the set of its runs of five words (as in bigcode-dataset's near deduplication); similar is an estimated Jaccard
similarity of at least 0.8. 20 bands of 6 rows propose a pair of similarity 0.8 with probability 1 - (1 - 0.8^6)^20 = 0.998;
every proposal is then checked by the whole signature (standard error 0.037 at 0.8). Memory: some 1.2 KB a document; on disk
0.65 KB in the job's journal. Seeded and versioned by the library, so the same everywhere; the journal names the version.

Documents that are alike but not similar (0.7: 92 % of the pairs share a band) would each be compared with all before them. So
one that MOST_ALIKE indexed documents were proposed for is kept without being indexed: a band holds no more than these.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

WORDS, PERMUTATIONS, BANDS, THRESHOLD, SEED = 5, 120, 20, 0.8, 1
#: 0.2 ms a document of a larger family; with all of them indexed a million would take a day in the one process that compares.
MOST_ALIKE = 1000
WORD = re.compile(r"\w+")
#: All runs of a text of 32 MiB at once took 1.7 GB.
SLICE_WORDS = 1 << 16
_LENGTH = struct.Struct("<H")


def word_slices(text: str) -> Iterator[list[str]]:
    """All words, SLICE_WORDS at a time; what is not the first begins with the last four of the one before it, so that no run is
    cut. A text without words is one itself."""
    words = (found[0] for found in WORD.finditer(text))
    part = list(islice(words, SLICE_WORDS))
    yield part or [text]
    while more := list(islice(words, SLICE_WORDS)):
        part = part[1 - WORDS :] + more
        yield part


def shingles(words: Sequence[str]) -> set[str]:
    """The runs of five words; one run of all there are in a shorter text."""
    return {" ".join(words[i : i + WORDS]) for i in range(max(len(words) - WORDS + 1, 1))}


def signatures(texts: Sequence[str]) -> list[bytes]:
    """One MinHash a text, as bytes that `NearDuplicates` and its journal take."""
    return [_signature(text) for text in texts]


def _signature(text: str) -> bytes:
    """A MinHash is a minimum over the runs, so they need not be there together."""
    import rensa

    minhash = rensa.RMinHash(PERMUTATIONS, SEED)
    for words in word_slices(text):
        minhash.update(shingles(words))
    return bytes(minhash.__getstate__())


class NearDuplicates:
    """The signatures of the documents taken so far."""

    def __init__(self) -> None:
        import rensa

        self._new = rensa.RMinHash
        self.kept: list[Any] = []
        self.not_indexed = 0
        self.index = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)

    def is_new(self, signature: bytes) -> bool:
        """False for a near duplicate of a document taken before; otherwise takes this one."""
        minhash = self._restore(signature)
        alike = self.index.query(minhash)
        if any(minhash.jaccard(self.kept[key]) >= THRESHOLD for key in alike):
            return False
        self._take(minhash, alike)
        return True

    def _restore(self, signature: bytes) -> Any:
        minhash = self._new(PERMUTATIONS, SEED)
        minhash.__setstate__(signature)
        return minhash

    def _take(self, minhash: object, alike: Sequence[int]) -> None:
        if len(alike) >= MOST_ALIKE:
            self.not_indexed += 1
            return
        self.index.insert(len(self.kept), minhash)
        self.kept.append(minhash)

    def take_journal(self, data: bytes) -> None:
        """Take up all documents of a journal (the concatenation of `record`s)."""
        at = 0
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            minhash = self._restore(data[at : at + length])
            self._take(minhash, self.index.query(minhash))
            at += length


def record(signature: bytes) -> bytes:
    return _LENGTH.pack(len(signature)) + signature
