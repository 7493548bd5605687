"""Text to ids, many strings at a time, with the ids of the tokenizers library on the original `tokenizer.json`.

The fast path is gigatoken on byte-level BPE tokenizers with GPT-2's splitting, with or without single digits before it
(StarCoder2's and ours). gigatoken does not know digit splitting and wants every byte in the vocabulary, so digits become
separators here, and missing bytes get ids beyond the vocabulary that must never come out. Its Unicode tables are newer than the
tokenizers library's: a text with a code point outside SAFE_RANGES goes to the library itself, and each block checks one
document against it.

MB of text per CPU second, StarCoder2's tokenizer on 39 MB of Python: tokenizers 2.2, gigatoken in this way 91 to 166.
"""

from __future__ import annotations

import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from data.cli import UserError
from data.terminal import say

NO_TOKEN = -1  # among `end_ids`: no token follows the text
CHECKED_CHARACTERS = 8192
DIGITS = "0123456789"
SPARSE_MOST = 8  # ids up to the largest, for each that there is
_DIGIT = re.compile("[0-9]")
_BOUNDARY = 0xFF  # never a byte of UTF-8
_UNKNOWN_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
#: Blocks that have long been settled, where both libraries were compared code point by code point (its test does it).
SAFE_RANGES = (
    (0x00, 0x24F),
    (0x370, 0x3FF),
    (0x400, 0x52F),
    (0x2000, 0x206F),
    (0x20A0, 0x20BF),
    (0x2190, 0x23FF),
    (0x2500, 0x27BF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xFF01, 0xFF60),
    (0x1F300, 0x1F64F),
)


class Encoder(Protocol):
    """`encode(texts, end_ids)`: ids of all texts back to back, int32, each text followed by `end_ids[i]` unless that is NO_TOKEN;
    and how many ids there are of each text, that one included, int32 [len(texts)].
    """

    def encode(self, texts: Sequence[str], end_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class ReferenceEncoder:
    """The tokenizers library itself. Special tokens spelled in a text stay text, and so do those of the ids `ours`, which are put
    between texts: a file that does not call its end of text special would have documents end where they speak of it, and so would
    a model that has it among its own words."""

    def __init__(self, tokenizer_json: str, ours: Sequence[int] = ()) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(_out_of_reach(tokenizer_json, ours))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises UserError where there is no id for a part of a text."""
        with naming_what_has_no_id("the tokenizer"):
            encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def encode(self, texts: Sequence[str], end_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _join([_followed(ids, token) for ids, token in zip(self.ids(texts), end_ids, strict=True)])


@contextmanager
def naming_what_has_no_id(tokenizer: str) -> Iterator[None]:
    """A model without an unknown token refuses a text that its vocabulary does not cover."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # that is all that the library raises
            raise
        advice = "take one with an unknown token, or with ids for all bytes"
        raise UserError(f"{tokenizer} has no id for a part of a text ({error}); {advice}") from error


def _out_of_reach(tokenizer_json: str, ours: Sequence[int]) -> str:
    """The same tokenizer, with which no text has one of the ids `ours`; a few cannot be changed so (`tokenizer.check_reach`)."""
    content = orjson.loads(tokenizer_json)
    added = content.get("added_tokens") or []
    renamed = _rename_words(content["model"], ours)
    plain = [token for token in added if token["id"] in ours and not token.get("special")]
    for token in plain:
        token["special"] = True
    if renamed:  # the library would add them a second time
        content["added_tokens"] = [token for token in added if token["id"] not in renamed]
    return orjson.dumps(content).decode() if plain or renamed else tokenizer_json


def _rename_words(model: dict[str, Any], ours: Sequence[int]) -> set[int]:
    """Give the model's own words of the ids `ours` names that are in no text; returns the ids. A word that merges make, a single
    character and the unknown token keep theirs: without it other texts would have other ids, or none."""
    words = model["vocab"]
    if "merges" in model and not model.get("ignore_merges"):  # only merges reach a word
        return set()
    unigram = isinstance(words, list)
    numbered = enumerate(word for word, _ in words) if unigram else ((number, word) for word, number in words.items())
    found = {number: word for number, word in numbered if number in ours and _is_renamed(model, number, word)}
    for number, word in found.items():
        hidden = word + secrets.token_hex(16)
        if unigram:
            words[number][0] = hidden
        else:
            words[hidden] = words.pop(word)
    return set(found)


def _is_renamed(model: dict[str, Any], number: int, word: str) -> bool:
    merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model.get("merges") or ())
    merged = any(word in (*merge, "".join(merge)) for merge in merges)
    return len(word) > 1 and word != model.get("unk_token") and number != model.get("unk_id") and not merged


class Piece(NamedTuple):
    """A part of a text. `rare`: it has a code point outside SAFE_RANGES."""

    text: str
    rare: bool


class NotFast(Exception):
    """gigatoken does not read a tokenizer that the tokenizers library has read."""


class FastEncoder:
    """gigatoken for texts of safe code points, the tokenizers library for the others. Raises NotFast."""

    def __init__(self, tokenizer_json: str, reference: ReferenceEncoder) -> None:
        import gigatoken

        content = orjson.loads(tokenizer_json)
        self.reference = reference
        self.source = gigatoken.BytesSource
        self.digits = _splits_digits(content)
        self.vocab_size = _complete(content)
        try:
            self.tokenizer = gigatoken.Tokenizer.from_json(orjson.dumps(content).decode())
        except RuntimeError as error:  # all that it raises
            raise NotFast(str(error).partition("\n")[0]) from error
        vocabulary = content["model"]["vocab"]
        # What a separator stands for: the id of its digit; a boundary's is the `end_ids` of its text.
        self.separator_ids = np.full(256, NO_TOKEN, np.int32)
        splitting = range(0x30, 0x3A) if self.digits else ()
        for byte in splitting:
            self.separator_ids[byte] = vocabulary[chr(byte)]
        self.table = bytes(_BOUNDARY if b in splitting else b for b in range(256))
        self.unsafe = unsafe_pattern()

    def encode(self, texts: Sequence[str], end_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self._encode(texts, end_ids)
        self._check_one(texts, end_ids, ids, lengths)
        return ids, lengths

    def _check_one(self, texts: Sequence[str], end_ids: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> None:
        """One short text of each call against the library: a thousandth of the data, some 3 % of the time."""
        candidates = [i for i, text in enumerate(texts) if 0 < len(text) <= CHECKED_CHARACTERS]
        if not candidates:
            return
        chosen = candidates[sum(map(len, texts)) % len(candidates)]
        start = int(lengths[:chosen].sum(dtype=np.int64))
        expected, _ = self.reference.encode([texts[chosen]], end_ids[chosen : chosen + 1])
        if not np.array_equal(expected, ids[start : start + lengths[chosen]]):
            raise UserError(
                "the fast encoder gives other ids than the tokenizers library for a document that begins with "
                f"{texts[chosen][:40]!r}; preprocess into a new folder with --encoder reference"
            )

    def _encode(self, texts: Sequence[str], end_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Texts in pieces: those with a rare code point go to the library, all others together to gigatoken."""
        pieces_of = [self._pieces(text) for text in texts]
        pieces = [piece for parts in pieces_of for piece in parts]
        ends = np.cumsum([len(parts) for parts in pieces_of], dtype=np.int64)
        piece_end_ids = np.full(len(pieces), NO_TOKEN, np.int32)
        piece_end_ids[ends - 1] = end_ids
        slow = [i for i, piece in enumerate(pieces) if piece.rare]
        if not slow:
            return self._encode_safe(list(texts), end_ids)
        safe = [i for i, piece in enumerate(pieces) if not piece.rare]
        ids, lengths = self._encode_safe([pieces[i].text for i in safe], piece_end_ids[safe])
        ids_of = dict(zip(safe, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)) if safe else {}
        slow_ids = self.reference.ids([pieces[i].text for i in slow])
        ids_of |= {i: _followed(ids, int(piece_end_ids[i])) for i, ids in zip(slow, slow_ids, strict=True)}
        ids, lengths = _join([ids_of[i] for i in range(len(pieces))])
        return ids, np.add.reduceat(lengths, np.concatenate(([0], ends[:-1])), dtype=np.int32)

    def _pieces(self, text: str) -> list[Piece]:
        """Where digits are cut out, what lies between two is encoded by itself, so only the surroundings of a rare code point up to
        the next digits need the slow way; else the whole text does."""
        if text.isascii() or not (match := self.unsafe.search(text)):
            return [Piece(text, False)]
        if not self.digits:
            return [Piece(text, True)]
        pieces, done = [], 0
        while match:
            start = max(text.rfind(digit, done, match.start()) for digit in DIGITS) + 1 or done
            digit = _DIGIT.search(text, match.end())
            end = digit.start() if digit else len(text)
            if start > done:
                pieces.append(Piece(text[done:start], False))
            pieces.append(Piece(text[start:end], True))
            done, match = end, self.unsafe.search(text, end)
        if done < len(text):
            pieces.append(Piece(text[done:], False))
        return pieces

    def _encode_safe(self, texts: Sequence[str], end_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All texts in one call of gigatoken, which is what makes it fast.

        Example, with digit splitting, for the texts "a1b" and "" with end ids 7 and 8:

            raw         a 1 b FF FF           FF ends a text; no UTF-8 contains it
            cut         a FF b FF FF          digits have become FF as well
            gigatoken   [ids of a] [ids of b] what lies between the separators; it leaves empty stretches out
            separators  id of 1, 7, 8         one id stands where each separator stood
            ids         [a] 1 [b] 7 8
        """
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        boundary = bytes([_BOUNDARY])
        raw = b"".join(piece for text in texts for piece in (text.encode(), boundary))
        cut = raw.translate(self.table)
        places_in_raw = np.flatnonzero(np.frombuffer(cut, np.uint8) == _BOUNDARY)
        found = self.tokenizer.encode_batch(self.source(cut, separator=boundary), parallel=False).layout
        # How many ids lie before each separator: 0 for the empty stretches, which gigatoken does not count.
        counts = np.zeros(len(places_in_raw), np.int64)
        counts[np.diff(places_in_raw, prepend=-1) > 1] = np.diff(found.offsets.data)
        separators = np.frombuffer(raw, np.uint8)[places_in_raw]
        text_ends = np.flatnonzero(separators == _BOUNDARY)
        separator_ids = self.separator_ids[separators]
        separator_ids[text_ends] = end_ids
        # Put together: separator k comes after all ids and separators before it, gigatoken's ids fill what is left.
        places = np.cumsum(counts + 1) - 1
        ids = np.empty(int(places[-1]) + 1, np.int32)
        inside = np.ones(len(ids), bool)
        inside[places] = False
        ids[inside] = found.content.data
        # Ids from the vocabulary's end on are bytes that `_complete` added, which the tokenizer does not have.
        assert len(ids) == len(places) or int(ids[inside].max()) < self.vocab_size
        ids[places] = separator_ids
        lengths = np.diff(places[text_ends], prepend=-1).astype(np.int32)
        if (end_ids == NO_TOKEN).any():
            ids, lengths = ids[ids != NO_TOKEN], lengths - (end_ids == NO_TOKEN)
        return ids, lengths


def _followed(ids: np.ndarray, token: int) -> np.ndarray:
    return ids if token == NO_TOKEN else np.append(ids, np.int32(token))


def _join(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, parts), np.int32, len(parts))
    return (np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)), lengths


def _splits_digits(content: dict[str, Any]) -> bool:
    return bool(content["pre_tokenizer"]["type"] == "Sequence")


def _complete(content: dict[str, Any]) -> int:
    """Change `content` into what gigatoken loads; returns the true vocabulary size: from there on are only the bytes added."""
    from tokenizers import pre_tokenizers

    vocabulary = content["model"]["vocab"]
    size = int(max(vocabulary.values())) + 1
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary))
    vocabulary.update({symbol: size + i for i, symbol in enumerate(missing)})
    content["pre_tokenizer"] = _BYTE_LEVEL
    content["added_tokens"] = []
    content["post_processor"] = None
    return size


@cache
def safe_symbols() -> list[str]:
    """What byte-level BPE calls the bytes of SAFE_RANGES.

    A tokenizer trained without `initial_alphabet` lacks those that it has not seen, and the library leaves them out of a text.
    """
    from tokenizers import pre_tokenizers

    text = "".join(chr(c) for low, high in SAFE_RANGES for c in range(low, high + 1))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return sorted({symbol for word, _ in words for symbol in word})


def unsafe_pattern() -> re.Pattern[str]:
    """Matches a code point outside SAFE_RANGES, unassigned, or a number (which digit splitting would cut) beyond 0 to 9."""
    chars = (chr(c) for low, high in SAFE_RANGES for c in range(low, high + 1))
    safe = [c for c in chars if c in DIGITS or (unicodedata.category(c)[0] != "N" and unicodedata.category(c) != "Cn")]
    return re.compile(f"[^{_ranges(safe)}]")


def _ranges(chars: list[str]) -> str:
    """A regular expression's character class, in ranges: one of 40,000 single characters would be slow."""
    runs: list[list[int]] = []
    for code in map(ord, chars):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in runs)


def can_be_fast(tokenizer_json: str) -> bool:
    """Whether the fast path gives this tokenizer's ids: byte-level BPE with GPT-2's pattern, nothing before, between or after."""
    content = orjson.loads(tokenizer_json)
    model, before = content["model"], content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before]) if before.get("type") == "Sequence" else [before]
    if len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True}:
        steps = steps[1:]
    elif before.get("type") == "Sequence":
        return False
    relevant = ("type", "add_prefix_space", "use_regex")
    return (
        sys.byteorder == "little"
        and content.get("normalizer") is None
        and [steps[0].get(k) for k in relevant] == [_BYTE_LEVEL[k] for k in relevant]
        and len(steps) == 1
        and model.get("type", "BPE") == "BPE"
        and not any(model.get(option) for option in _UNKNOWN_OPTIONS)
        and all(token.get("special") for token in content.get("added_tokens", []))
        and all(symbol in model["vocab"] for symbol in safe_symbols())
        # gigatoken has 16 bytes for each id up to the largest, and ends the process where there is no room for them
        and max(model["vocab"].values()) < SPARSE_MOST * len(model["vocab"])
        # gigatoken refuses two tokens of one id, or takes one of them: which, changes from run to run
        and len(set(model["vocab"].values())) == len(model["vocab"])
    )


def make_encoder(tokenizer_json: str, backend: str = "auto", ours: Sequence[int] = ()) -> Encoder:
    """`auto`: the fast path where it applies; `reference`: always the tokenizers library. `ours`: as of ReferenceEncoder."""
    reference = ReferenceEncoder(tokenizer_json, ours)
    if backend == "auto" and can_be_fast(tokenizer_json):
        try:
            return FastEncoder(tokenizer_json, reference)
        except NotFast as error:
            say(f"note: gigatoken does not read this tokenizer ({error}); the tokenizers library encodes, some 40 times slower")
    return reference
