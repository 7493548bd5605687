"""Fill-in-the-middle: some documents are cut at two characters into prefix, middle and suffix and rearranged.

    PSM  <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle <end>
    SPM  <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle <end>

Bavarian et al. 2022 (arXiv 2207.14255): character-level cuts, per document, before packing; SPM is their variant 2, which
StarCoder and Megatron-LM (fim_dataset.py) use. The three parts are encoded one by one, as a model will see them when it fills in.

It is done here, when shards are made, and not in the loader, because each part has to be encoded anew (cutting between tokens
teaches a model that a gap never falls inside one, and single-line infilling suffers) and every document grows by three tokens: in
a loader both would cost the property that sample i is tokens [i*T, i*T+T] and a position one integer. The price is that a
document keeps its cut from epoch to epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from data.tokens.encoder import NO_TOKEN


@dataclass(frozen=True, kw_only=True)
class FimOptions:
    """`rate`: share of documents changed; `spm_rate`: share of those in SPM order; ids of the three tokens."""

    rate: float
    spm_rate: float
    seed: int
    prefix: int
    middle: int
    suffix: int


def chances(key: bytes, part: int, seed: int) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1), a pure function of the document's content, its part and the seed."""
    digest = hashlib.blake2b(key + part.to_bytes(8, "little") + seed.to_bytes(8, "little"), digest_size=32).digest()
    first, second, third, fourth = (int.from_bytes(digest[i : i + 8], "little") >> 11 for i in range(0, 32, 8))
    return first / 2**53, second / 2**53, third / 2**53, fourth / 2**53


def arrange(text: str, eos: int, key: bytes, part: int, options: FimOptions | None) -> list[tuple[str, int]]:
    """The document as pieces (text, id that follows it, or NO_TOKEN). Without the ids, and in order, the texts are the document."""
    if options is None:
        return [(text, eos)]
    chosen, spm, one, two = chances(key, part, options.seed)
    if chosen >= options.rate:
        return [(text, eos)]
    # A cut can fall before, between and behind the characters.
    low, high = sorted((int(one * (len(text) + 1)), int(two * (len(text) + 1))))
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    if spm < options.spm_rate:
        start = [("", options.prefix), ("", options.suffix), (suffix, options.middle)]
        return [*start, (prefix, NO_TOKEN), (middle, eos)]
    return [("", options.prefix), (prefix, options.suffix), (suffix, options.middle), (middle, eos)]
