"""Fill-in-the-middle: nothing of a document is lost, the rates are right, and the same documents change every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import read_documents, write_rows
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tokens.encoder import NO_TOKEN
from data.tokens.fim import FimOptions, arrange

EOS, PREFIX, MIDDLE, SUFFIX = 0, 1, 2, 3


def options(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 0) -> FimOptions:
    return FimOptions(rate=rate, spm_rate=spm_rate, seed=seed, prefix=PREFIX, middle=MIDDLE, suffix=SUFFIX)


def put_back(told: list[tuple[str, int]]) -> tuple[str, str]:
    """(the document, its order), read by the tokens alone."""
    texts, tokens = [t for t, _ in told], [a for _, a in told]
    if tokens == [EOS]:
        return texts[0], "plain"
    if tokens == [PREFIX, SUFFIX, MIDDLE, EOS]:
        assert texts[0] == ""
        return texts[1] + texts[3] + texts[2], "psm"
    assert tokens == [PREFIX, SUFFIX, MIDDLE, NO_TOKEN, EOS] and texts[:2] == ["", ""]
    return texts[3] + texts[4] + texts[2], "spm"


@given(st.text(), st.binary(min_size=16, max_size=16), st.integers(0, 3))
def test_nothing_is_lost(text: str, key: bytes, part: int) -> None:
    assert put_back(arrange(text, EOS, key, part, options()))[0] == text
    assert arrange(text, EOS, key, part, None) == [(text, EOS)]
    assert arrange(text, EOS, key, part, options(rate=0.0)) == [(text, EOS)]


def test_rates_and_cuts() -> None:
    text = "".join(map(chr, range(32, 127)))
    told = [arrange(text, EOS, i.to_bytes(16, "little"), 0, options(0.5, 0.25)) for i in range(4000)]
    orders = [put_back(t)[1] for t in told]
    assert abs(orders.count("plain") / 4000 - 0.5) < 0.04
    assert abs(orders.count("spm") / (4000 - orders.count("plain")) - 0.25) < 0.04
    psm = [[piece for piece, _ in t[1:]] for t, order in zip(told, orders, strict=True) if order == "psm"]
    prefixes, suffixes, middles = zip(*psm, strict=True)
    # Two uniform cuts: the middle is a third of the document on average, and may be empty or all of it.
    assert abs(sum(map(len, middles)) / len(middles) / len(text) - 1 / 3) < 0.03
    starts = [text.index(m[0]) for m in middles if m]
    assert min(starts) < 3 and max(starts) > 85
    assert "" in prefixes and "" in suffixes, "a cut before the first character, one behind the last"


def test_the_choice_is_the_document_s_the_part_s_and_the_seed_s() -> None:
    keys = [i.to_bytes(16, "little") for i in range(50)]

    def once(seed: int = 0, part: int = 0) -> list[list[tuple[str, int]]]:
        return [arrange("x" * 100, EOS, k, part, options(0.5, 0.5, seed)) for k in keys]

    assert once() == once() and once() != once(seed=1) and once() != once(part=1)


@pytest.mark.parametrize(("spm_rate", "order"), [(0, "psm"), (1, "spm")])
def test_through_the_command(
    spm_rate: int, order: str, tmp_path: Path, preprocess: Any, tokenizer_file: Path, texts: list[str]
) -> None:
    """Ids between the special tokens are those of each piece alone, and the pieces are the document."""
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--fim_rate", 1, "--fim_spm_rate", spm_rate]
    path = write_rows(tmp_path / "x.jsonl", [{"content": t} for t in texts])
    code, _, err = preprocess("--input", path, *flags, "--validation_fraction", 0.3)
    assert code == 0, err
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train, held_out = read_documents(tmp_path / "out"), read_documents(tmp_path / "out", "validation")
    assert len(train) > 20 and len(held_out) > 8
    found = []
    for ids in train:
        assert [ids.count(t) for t in (EOS, PREFIX, MIDDLE, SUFFIX)] == [1, 1, 1, 1] and ids[0] == PREFIX
        a, b = ids.index(SUFFIX), ids.index(MIDDLE)
        first, second, third = ids[1:a], ids[a + 1 : b], ids[b + 1 : -1]
        assert (order == "spm") <= (first == [])
        found.append(tokenizer.decode([*first, *third, *second]))
        if order == "psm":
            assert all(tokenizer.encode(tokenizer.decode(piece)).ids == piece for piece in (first, second, third))
    # Off for the evaluation split unless asked for.
    assert all(ids == [*tokenizer.encode(tokenizer.decode(ids[:-1])).ids, EOS] for ids in held_out)
    assert sorted([*found, *(tokenizer.decode(ids[:-1]) for ids in held_out)]) == sorted(texts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"]["fill_in_the_middle"] == len(train)
    assert sum(s["text_bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in texts)


def test_each_part_of_a_long_document_has_a_chance_of_its_own(tmp_path: Path, preprocess: Any, tokenizer_file: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"content": "".join(f"line_{i} = {i}\n" for i in range(600))}])
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--fim_rate", 0.5, "--max_document_bytes", 300]
    assert preprocess("--input", path, *flags, "--validation_fraction", 0)[0] == 0
    parts = read_documents(tmp_path / "out")
    rearranged = sum(ids[0] == PREFIX for ids in parts)
    assert len(parts) > 20 and len(parts) / 4 < rearranged < 3 * len(parts) / 4


def test_validation_when_asked_for(tmp_path: Path, preprocess: Any, tokenizer_file: Path, corpus: Path) -> None:
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--fim_rate", 1, "--fim_validation"]
    assert preprocess("--input", corpus, *flags, "--validation_fraction", 0.3)[0] == 0
    assert all(ids[0] == PREFIX for ids in read_documents(tmp_path / "out", "validation"))


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path, preprocess: Any, tokenizer_text: str, corpus: Path) -> None:
    (tmp_path / "t.json").write_text(tokenizer_text.replace("fim_", "other_"))
    flags = ["--tokenizer", tmp_path / "t.json", "--output", tmp_path / "out", "--fim_rate", 0.5]
    code, _, err = preprocess("--input", corpus, *flags)
    assert code == 2 and "--fim_rate needs the tokens" in err
