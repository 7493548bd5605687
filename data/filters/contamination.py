"""Benchmarks out of the training data: a document that shares one run of ten words with a benchmark's task is removed.

Ten words are what DeepSeek-Coder used (arXiv 2401.14196, section 2.1). A word is a run of letters, digits and underscores, so
layout and punctuation make no difference. Ours differs in one point: six of the ten must be different names (two characters or
more, no number). Without that, 119 of 2,400 files of our development corpus fell to `1 2 3 4 5 6 7 8 9 10`, `a b c d e f g h i j`
or `for i in range n for j in range i`. (marin-community/marin #6852 had the same: most of what they flagged was false.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

N_WORDS, MIN_NAMES = 10, 6
WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that a rolling hash modulo 2^64 loses nothing


class Contamination:
    """Rule over documents: the benchmark that it shares words with. Built from {file name: its texts}."""

    def __init__(self, benchmarks: Mapping[str, Sequence[str]]) -> None:
        self.ids: dict[str, int] = {}
        self.hashes: dict[str, np.ndarray] = {}
        words = {name: [WORD.findall(text) for text in texts] for name, texts in benchmarks.items()}
        for lists in words.values():
            for word in (w for found in lists for w in found):
                self.ids.setdefault(word, len(self.ids) + 1)
        for name, lists in words.items():
            runs = [run_hashes(self._numbers(found))[telling(found)] for found in lists if len(found) >= N_WORDS]
            self.hashes[name] = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)

    def _numbers(self, words: list[str]) -> np.ndarray:
        """int64 [W]: each word's number; 0 for one that no benchmark has."""
        return np.fromiter((self.ids.get(w, 0) for w in words), np.int64, len(words))

    def __call__(self, text: str, fields: Mapping[str, Any]) -> str | None:
        numbers = self._numbers(WORD.findall(text))
        if len(numbers) < N_WORDS:
            return None
        unknown = np.concatenate([[0], np.cumsum(numbers == 0)])
        known_runs = run_hashes(numbers)[unknown[N_WORDS:] == unknown[:-N_WORDS]]
        for name, hashes in self.hashes.items():
            if len(known_runs) and len(hashes):
                at = np.searchsorted(hashes, known_runs)
                if (hashes[np.minimum(at, len(hashes) - 1)] == known_runs).any():
                    return f"overlaps {name}"
        return None


def run_hashes(numbers: np.ndarray) -> np.ndarray:
    """uint64 [W - N_WORDS + 1]: a hash of each run of N_WORDS numbers, in as many passes over the whole array."""
    powers = [np.uint64(pow(_BASE, k, 2**64)) for k in range(1, N_WORDS + 1)]
    count = len(numbers) - N_WORDS + 1
    words = numbers.astype(np.uint64)
    return sum((words[k : k + count] * power for k, power in enumerate(powers)), np.zeros(count, np.uint64))


def telling(words: list[str]) -> np.ndarray:
    """bool [W - N_WORDS + 1]: runs with MIN_NAMES different names among their words."""
    runs = (words[i : i + N_WORDS] for i in range(len(words) - N_WORDS + 1))
    return np.array([len({w for w in run if len(w) > 1 and not w[0].isdigit()}) >= MIN_NAMES for run in runs], bool)
