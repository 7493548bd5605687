"""The fast encoder gives the tokenizers library's ids, document by document; what it cannot do goes to the library."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import shared_data
from support import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data.cli import UserError
from data.terminal import drain
from data.tokens.encoder import (
    NO_TOKEN,
    SAFE_RANGES,
    FastEncoder,
    ReferenceEncoder,
    _complete,
    can_be_fast,
    make_encoder,
    safe_symbols,
)

HARD = [
    "",
    "0",
    "a1b22 333\n 4",
    "x = 10\n    y=2 \t 3",
    "don't I'll 'S '",
    "<|endoftext|> <fim_prefix>1",
    "a\r\nb\rc",
    "\t\t\n\n  \n x",
    "\0\x01\x1c\x1d\x1e\x1f\x7f",
    "é1è ½ ² Ⅷ ٣ 一二3",
    "\u2028 \u2029 \x85 \xa0 \u3000 \u200b\ufeff",
    "\ua7cf \U00016d63",
    "😀1😀",
    "\U000e0001",
    "\U00045678 unassigned, first byte F1",
    "ﬁ1",
    "क1ि",
    "한국어 코드 1",
    "नमस्ते दुनिया",
    "a" * 5000,
    "1" * 3000,
    " " * 3000,
    "=" * 1000 + "9",
]


@pytest.fixture(scope="module", params=["trained", "starcoder2"])
def text(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("tokenizer_text" if request.param == "trained" else "starcoder2")


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Independent of ReferenceEncoder: one call a text, special tokens spelled out stay text."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def documents(encoder: FastEncoder | ReferenceEncoder, texts: list[str], after: list[int]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts, np.array(after, np.int32))
    assert ids.dtype == lengths.dtype == np.int32 and len(ids) == lengths.sum() and len(lengths) == len(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []


def test_hard_texts_one_by_one_and_together(text: str, texts: list[str]) -> None:
    fast, reference = make_encoder(text), ReferenceEncoder(text)
    assert isinstance(fast, FastEncoder)
    tokenizer = Tokenizer.from_str(text)
    right = [[*library_ids(tokenizer, t), 7] for t in [*HARD, *texts]]
    for encoder in (fast, reference):
        assert documents(encoder, [*HARD, *texts], [7] * len(right)) == right
        assert [documents(encoder, [t], [7])[0] for t in HARD] == right[: len(HARD)]
        assert documents(encoder, [], []) == []


def test_nothing_after_a_text_is_nothing(text: str) -> None:
    tokenizer = Tokenizer.from_str(text)
    parts, after = ["", "a1", "", "2", "é\ua7cf", ""], [1, NO_TOKEN, NO_TOKEN, 2, NO_TOKEN, 3]
    right = [library_ids(tokenizer, p) + ([a] if a != NO_TOKEN else []) for p, a in zip(parts, after, strict=True)]
    for encoder in (make_encoder(text), ReferenceEncoder(text)):
        assert documents(encoder, parts, after) == right


def test_every_code_point_called_safe_is(starcoder2: str) -> None:
    """Each safe code point beside letters, digits, spaces, itself: 36,000 of them, and the unsafe ones are not few either."""
    reference = ReferenceEncoder(starcoder2)
    fast = FastEncoder(starcoder2, reference)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    safe = [c for c in every if not fast.unsafe.search(c)]
    assert 30_000 < len(safe) < 50_000 and {"a", "é", "Ж", "中", "한", "→", "😀"} <= set(safe)
    assert not {"½", "²", "Ⅷ", "٣", "\ua7cf", "क"} & set(safe)
    samples = [f"a{c}b {c} x{c}{c}1{c} \n{c}\n {c}  {c}'s'{c}. {c}={c}_" for c in safe]
    after = np.zeros(len(samples), np.int32)
    right, right_lengths = reference.encode(samples, after)
    found, lengths = fast._encode_safe(samples, after)
    assert np.array_equal(lengths, right_lengths) and np.array_equal(found, right)


def test_random_mixtures_of_safe_characters(starcoder2: str) -> None:
    reference = ReferenceEncoder(starcoder2)
    fast = FastEncoder(starcoder2, reference)
    rng = random.Random(5)
    letters = "aZ_ \n\t\r.,(){}'\"#=0123456789éßЖ中한→…–\u00a0\u2028\u3000😀'\x0b\x0c"
    samples = ["".join(rng.choices(letters, k=rng.randrange(80))) for _ in range(4000)]
    after = np.zeros(len(samples), np.int32)
    found, right = fast._encode_safe(samples, after), reference.encode(samples, after)
    assert np.array_equal(found[0], right[0]) and np.array_equal(found[1], right[1])


def test_only_the_surroundings_of_a_rare_character_go_to_the_library(starcoder2: str) -> None:
    """Up to the next digits on both sides, wherever it stands; the ids stay those of the whole text."""
    draw = random.Random(5)
    tokenizer, reference = Tokenizer.from_str(starcoder2), ReferenceEncoder(starcoder2)
    fast, seen, ids_of = FastEncoder(starcoder2, reference), [], reference.ids
    reference.ids = lambda texts: seen.extend(texts) or ids_of(texts)  # type: ignore[method-assign, func-returns-value]
    kinds = ["½²Ⅷ٣\ua7cf\U00016d63क\U00045678", "0123456789", "ab_ \n\t'.(=é中"]
    texts = ["".join(draw.choice(draw.choices(kinds, (1, 2, 9))[0]) for _ in range(draw.randint(1, 80))) for _ in range(400)]
    texts += ["x = 1\n" * 500 + "# \ua7cf" + "\ny = 2" * 500, "\ua7cf", "7\ua7cf", "\ua7cf7", "7\ua7cf\ua7cf7½8"]
    expected = [library_ids(tokenizer, text) for text in texts]
    ids, lengths = fast._encode(texts, np.full(len(texts), NO_TOKEN, np.int32))
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    assert seen and all(fast.unsafe.search(text) and not set(text) & set("0123456789") for text in seen)
    assert max(map(len, seen)) < 90 < 3000 < max(map(len, texts))


def test_a_fast_encoder_that_errs_is_caught_at_run_time(tokenizer_text: str) -> None:
    encoder = FastEncoder(tokenizer_text, ReferenceEncoder(tokenizer_text))
    encoder.separator_ids[ord("7")] = encoder.separator_ids[ord("8")]
    documents(encoder, ["no such digit here"], [0])
    with pytest.raises(ValueError, match="--encoder reference"):
        documents(encoder, ["x = 7"], [0])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c.update(pre_tokenizer=None),
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
        lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0),  # a sequence of one, which splits no digits
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"].update(ignore_merges=True),
        lambda c: c["model"].update(byte_fallback=True),
        lambda c: c["model"].update(continuing_subword_prefix="##"),
        lambda c: c["model"].update(end_of_word_suffix="</w>"),
        lambda c: c["added_tokens"][0].update(special=False),
    ],
)
def test_other_tokenizers_go_to_the_library(tokenizer_text: str, change: object) -> None:
    content = json.loads(tokenizer_text)
    assert can_be_fast(tokenizer_text)
    change(content)  # type: ignore[operator]
    assert not can_be_fast(json.dumps(content))


def test_two_tokens_of_one_id_go_to_the_library(tokenizer_text: str, texts: list[str]) -> None:
    """gigatoken refuses them in some runs, with an error of its own, and in others not."""
    content = json.loads(tokenizer_text)
    content["model"]["vocab"]["another"] = content["model"]["vocab"]["!"]
    changed = json.dumps(content)
    encoder, tokenizer = make_encoder(changed), Tokenizer.from_str(changed)
    assert not can_be_fast(changed) and isinstance(encoder, ReferenceEncoder)
    assert documents(encoder, texts[:3], [0] * 3) == [[*library_ids(tokenizer, t), 0] for t in texts[:3]]


def test_what_gigatoken_refuses_goes_to_the_library_in_one_line(
    tokenizer_text: str, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_a_byte(changed: dict) -> int:
        size = _complete(changed)
        del changed["model"]["vocab"]["!"]
        return size

    monkeypatch.setattr("data.tokens.encoder._complete", without_a_byte)
    made, tokenizer = make_encoder(tokenizer_text), Tokenizer.from_str(tokenizer_text)
    drain()
    said = capsys.readouterr().err
    assert isinstance(made, ReferenceEncoder) and said.count("\n") == 1
    assert "(Byte remapping failed: no single-byte vocab entry for byte 0x21)" in said
    assert documents(made, texts[:3], [0] * 3) == [[*library_ids(tokenizer, t), 0] for t in texts[:3]]
    monkeypatch.setattr("data.tokens.encoder._splits_digits", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours stays one
        make_encoder(tokenizer_text)


def test_a_tokenizer_without_some_bytes_goes_to_the_library(texts: list[str]) -> None:
    """As the library trains one by default, without the bytes that it has not seen; the first of them in a text ended the job."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["def f(x):\n    return x + 1234567890\n"] * 9, trainer)
    text = tokenizer.to_str()
    encoder = make_encoder(text)
    samples = ["def f(x)", "Z = 7 \0 é", "\u65e5", *texts[:3]]
    assert not can_be_fast(text) and isinstance(encoder, ReferenceEncoder)
    assert documents(encoder, samples, [0] * 6) == [[*library_ids(tokenizer, t), 0] for t in samples]
    assert documents(encoder, samples[2:3], [0]) == [[0]]


def test_the_bytes_of_safe_texts(starcoder2: str) -> None:
    """Counted once more by hand; StarCoder2's, which lacks those that no text has, stays fast."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    seen = {byte for low, high in SAFE_RANGES for code in range(low, high + 1) for byte in chr(code).encode()}
    assert set(safe_symbols()) == {symbol[byte] for byte in seen} and 180 < len(seen) < 256
    assert can_be_fast(starcoder2)


def test_an_id_far_beyond_the_others_goes_to_the_library(tokenizer_text: str) -> None:
    """gigatoken's table up to 2**31 would be 32 GiB, for want of which it aborts."""
    content = json.loads(tokenizer_text)
    content["model"]["vocab"]["another"] = 2**31 - 1
    assert not can_be_fast(json.dumps(content)) and isinstance(make_encoder(json.dumps(content)), ReferenceEncoder)


def test_ids_with_a_gap_between_them(tokenizer_text: str, texts: list[str]) -> None:
    """Bytes that the tokenizer lacks are added behind the largest id, not behind as many as there are."""
    content = json.loads(tokenizer_text)
    words = content["model"]["vocab"]
    largest = max(words.values())
    words.update({word: number + largest for word, number in words.items() if number > largest - 200})
    changed = json.dumps(content)
    encoder, tokenizer = make_encoder(changed), Tokenizer.from_str(changed)
    assert isinstance(encoder, FastEncoder)
    samples = [*HARD, *texts]
    right = [[*library_ids(tokenizer, t), 0] for t in samples]
    assert documents(encoder, samples, [0] * len(samples)) == right and max(map(max, right)) > largest


def test_without_digit_splitting(tokenizer_text: str, texts: list[str]) -> None:
    content = json.loads(tokenizer_text)
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]
    changed = json.dumps(content)
    fast, tokenizer = make_encoder(changed), Tokenizer.from_str(changed)
    assert isinstance(fast, FastEncoder)
    samples = [*HARD, *texts]
    assert documents(fast, samples, [0] * len(samples)) == [[*library_ids(tokenizer, t), 0] for t in samples]


SPLIT = pre_tokenizers.Split(" ", "isolated")
LETTERS = {"</s>": 0, "<unk>": 1, "a": 2, "<": 3, "/": 4, "s": 5, ">": 6, " ": 7, "é": 8}
PIECES = [(word, 0.0 if number < 2 else -2.0) for word, number in LETTERS.items()]
OWN_WORDS = [
    models.Unigram(PIECES, unk_id=1),
    models.WordLevel(LETTERS, unk_token="<unk>"),
    models.WordPiece(LETTERS, unk_token="<unk>"),
    models.BPE(vocab=LETTERS, merges=[], ignore_merges=True),
]


def with_own_words(model: object) -> Tokenizer:
    """A tokenizer whose model has its end of text, id 0, among its own words; id 9 is a token that texts have."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = SPLIT
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.add_tokens(["<mine>"])
    return tokenizer


@pytest.mark.parametrize("model", OWN_WORDS, ids=lambda model: type(model).__name__)
def test_a_text_that_spells_the_end_of_text_is_not_cut(model: object) -> None:
    """Its documents ended where they spelled it: T5's tokenizer has it among the model's words."""
    tokenizer = with_own_words(model)
    spelled = tokenizer.to_str()
    assert library_ids(tokenizer, "a </s> a") == [2, 7, 0, 7, 2], "the trap is real"
    encoder = make_encoder(spelled, "auto", (0,))
    ids, lengths = encoder.encode(["a </s> a", "é<mine>s a b"], np.array([0, 0], np.int32))
    first, second = ids[: lengths[0]].tolist(), ids[lengths[0] :].tolist()
    assert first[:2] == [2, 7] and first[-3:] == [7, 2, 0] and first.count(0) == 1
    assert second == [*library_ids(tokenizer, "é<mine>s a b"), 0] and 9 in second
    assert not isinstance(model, (models.Unigram, models.BPE)) or first[2:-3] == [3, 4, 5, 6]


def test_what_has_no_id_is_said_in_one_sentence() -> None:
    model = models.Unigram([("a", -1.0)], unk_id=None)
    with pytest.raises(UserError, match=r"has no id for a part of a text .*unk_id"):
        ReferenceEncoder(Tokenizer(model).to_str()).encode(["a", "b"], np.array([0, 0], np.int32))


@pytest.mark.slow
def test_the_whole_corpus(starcoder2: str, tmp_path: Path) -> None:
    """Every document of ../shared/data/make_corpus.py (100 MB): identical ids."""
    import subprocess
    import sys

    subprocess.run([sys.executable, shared_data("make_corpus.py"), tmp_path], check=True, cwd=ROOT)
    reference = ReferenceEncoder(starcoder2)
    fast = FastEncoder(starcoder2, reference)
    count = 0
    for path in sorted(tmp_path.glob("*.json.gz")):
        with gzip.open(path) as file:
            samples = [json.loads(line)["content"] for line in file]
        after = np.zeros(len(samples), np.int32)
        for found, right in zip(fast.encode(samples, after), reference.encode(samples, after), strict=True):
            assert np.array_equal(found, right), path
        count += len(samples)
    assert count > 6000
