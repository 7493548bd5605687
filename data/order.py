"""The order of samples as arithmetic: nothing is built, stored or shuffled, so a position is one integer and start-up is free.

Permutation: a Feistel network over pairs (a, b) in Z_A x Z_B with A * B just above n, the halves changed in turn by modular
addition (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, their generalised Feistel), and cycle walking: a value
outside [0, n) goes through again until it falls inside. A and B are near sqrt(n), so that about one value in sqrt(n) needs a
second pass; the usual balanced network on an even number of bits needs up to four passes of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

ROUNDS = 8  # each changes one half
#: Slots of a blend's period at most: 0.7 and 0.3 need 10; shares that need more are rounded to thousandths.
MAX_PERIOD = 1000
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's increment
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(32)


def mix(x: int) -> int:
    """splitmix64's finaliser: every input bit moves every output bit (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=64)
def round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    base = mix(mix(seed + _GOLDEN & _MASK) + epoch * _GOLDEN & _MASK)
    return tuple(np.uint64(mix(base + (r + 1) * _GOLDEN & _MASK)) for r in range(ROUNDS))


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where positions `index` (int64 [B], in [0, n)) go in the permutation of [0, n) of (seed, epoch). int64 [B]."""
    out = _pass(index.astype(np.uint64), n, seed, epoch)
    outside = np.flatnonzero(out >= n)
    while len(outside):
        out[outside] = _pass(out[outside], n, seed, epoch)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _pass(x: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Once through the network: a permutation of [0, A * B)."""
    size_b = math.isqrt(n - 1) + 1
    sizes = np.uint64(ceil_div(n, size_b)), np.uint64(size_b)
    a, b = np.divmod(x, sizes[1])
    for number, key in enumerate(round_keys(seed, epoch)):
        hashed = (b ^ key) * _MULTIPLIER
        hashed ^= hashed >> _SHIFT
        hashed *= _MULTIPLIER
        hashed >>= _SHIFT
        hashed += a
        hashed %= sizes[number % 2]
        a, b = b, hashed
    return a * sizes[1] + b


def permute_epochs(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sample numbers (int64 [B], from 0 on without end) as samples of [0, n): each epoch of n numbers has its own permutation."""
    epoch, within = np.divmod(index, n)
    first = int(epoch[0]) if len(epoch) else 0
    if (epoch == first).all():
        return permute(within, n, seed, first)
    out = np.empty_like(within)
    for number in np.unique(epoch).tolist():
        chosen = epoch == number
        out[chosen] = permute(within[chosen], n, seed, number)
    return out


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def blend_counts(weights: Sequence[float]) -> list[int]:
    """Slots of each source in a period: exact where MAX_PERIOD allows, else by largest remainder, and at least one each."""
    written = [Fraction(str(w)) for w in weights]
    shares = [w / sum(written) for w in written]
    period = math.lcm(*(s.denominator for s in shares))
    if period <= MAX_PERIOD:
        return [int(s * period) for s in shares]
    counts = [max(int(s * MAX_PERIOD), 1) for s in shares]
    missing = [s * MAX_PERIOD - c for s, c in zip(shares, counts, strict=True)]
    for k in sorted(range(len(counts)), key=lambda k: -missing[k])[: max(MAX_PERIOD - sum(counts), 0)]:
        counts[k] += 1
    return counts


def blend_slots(weights: Sequence[float]) -> np.ndarray:
    """int64 [P]: which source each slot of a period takes, spread evenly; source k has exactly its share of the P slots.

    Smooth weighted round robin: each slot goes to the source that lags its share most, the first one on a tie.
    """
    counts = blend_counts(weights)
    period = sum(counts)
    credit, slots = [0] * len(counts), np.empty(period, np.int64)
    for slot in range(period):
        credit = [c + n for c, n in zip(credit, counts, strict=True)]
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= period
        slots[slot] = best
    return slots


def earlier_slots(slots: np.ndarray) -> np.ndarray:
    """int64 [P]: how many earlier slots of the period take the same source."""
    earlier = np.empty_like(slots)
    for source in np.unique(slots):
        chosen = slots == source
        earlier[chosen] = np.arange(chosen.sum())
    return earlier
