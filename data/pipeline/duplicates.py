"""Duplicates out, in document order: the first of equal (or similar) documents stays. What was seen survives a kill in journals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.filters.near_duplicates import NearDuplicates, record
from data.pipeline.ledger import KEY_JOURNAL, KEYS_BYTES, NEAR_JOURNAL, Ledger
from data.pipeline.worker import Result
from data.sources.blocks import Rejection


class Duplicates:
    """kind: none, exact, or near (which includes exact).

    Memory: some 100 bytes a document for exact (16 on disk), some 1.3 KB for near. Equal means equal but for white space.
    """

    def __init__(self, kind: str, ledger: Ledger, folder: Path) -> None:
        self.kind, self.ledger = kind, ledger
        self.seen: set[bytes] = set()
        self.near = NearDuplicates() if kind == "near" else None
        if kind != "none":
            data = (folder / KEY_JOURNAL).read_bytes()
            self.seen = {data[i : i + KEYS_BYTES] for i in range(0, len(data), KEYS_BYTES)}
        if self.near:
            self.near.take_journal((folder / NEAR_JOURNAL).read_bytes())

    def fresh(self, result: Result) -> np.ndarray:
        """bool [D]: documents to keep. Adds the others to `result.removed`."""
        fresh = np.ones(len(result.keys), bool)
        if self.kind == "none":
            return fresh
        for i, key in enumerate(map(bytes, result.keys)):
            reason = self._reason(key, result.signatures[i] if self.near else b"")
            if reason:
                fresh[i] = False
                result.removed.append((result.numbers[i], Rejection(*result.origins[i], reason)))
        return fresh

    def _reason(self, key: bytes, signature: bytes) -> str | None:
        if key in self.seen:
            return "exact duplicate"
        self.seen.add(key)
        self.ledger.append(KEY_JOURNAL, key)
        if self.near and not self.near.is_new(signature):
            return "near duplicate"
        if self.near:
            self.ledger.append(NEAR_JOURNAL, record(signature))
        return None
