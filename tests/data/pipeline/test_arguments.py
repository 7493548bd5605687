"""A mistake on the command line is one sentence that names the flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere"], "no input at nowhere"),
        (["--input", "tree:"], "--input tree: names no folder"),
        (["--input", "hub:"], "--input hub: names no data set"),
        (["--shard_tokens", "0"], "--shard_tokens must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--validation_fraction", "1.5"], "--validation_fraction must be from 0 to 1"),
        (["--fim_rate", "-1"], "--fim_rate must be from 0 to 1"),
        (["--tokenizer", "/nowhere/tokenizer.json"], "no tokenizer at /nowhere"),
        (["--decontaminate", "/nowhere.jsonl"], "--decontaminate /nowhere.jsonl"),
        (["--dedup", "fuzzy"], "invalid choice"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--text_field", "body"], "x no field body; name the field that holds the text with --text_field"),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str], message: str, corpus: Path, tokenizer_file: Path, tmp_path: Path, preprocess: Any
) -> None:
    usual = ["--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    code, _, err = preprocess(*usual, *flags)
    assert code == 2 and message in err and "Traceback" not in err
    # Nothing is left that would refuse the corrected command.
    assert preprocess(*usual, "--validation_fraction", 0)[0] == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--shard_tokens", 10**30),
        ("--max_document_bytes", 2**63),
        ("--seed", 2**64),
        ("--seed", -1),
        ("--workers", 10**9),
        ("--validation_fraction", "nan"),
        ("--fim_rate", "inf"),
        ("--shard_tokens", "1e9"),
        ("--tokenizer", ""),
        ("--output", ""),
        ("--input", ""),
        ("--text_field", ""),
        ("--licenses", ""),
    ],
)
def test_a_number_out_of_range_or_an_empty_value_names_its_flag(
    flag: str, value: object, corpus: Path, tokenizer_file: Path, tmp_path: Path, preprocess: Any
) -> None:
    code, _, err = preprocess("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", flag, value)
    assert code == 2 and flag in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("vocabulary", [260, 2**40])
def test_a_vocabulary_out_of_range_names_its_flag(vocabulary: int, corpus: Path, tmp_path: Path, preprocess: Any) -> None:
    code, _, err = preprocess("--input", corpus, "--train_tokenizer", vocabulary, "--output", tmp_path / "out")
    assert code == 2 and "--train_tokenizer must be at least 261" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelled", [[".py", ".c"], ["py", "c"], ["*.py", "*.c"]])
def test_endings_can_be_spelled_in_three_ways(spelled: list[str], tmp_path: Path, preprocess: Any, tokenizer_file: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("a.py", "b.c", "c.h"):
        (tmp_path / "tree" / name).write_text(f"int {name[0]};\n")
    flags = ["--input", f"tree:{tmp_path / 'tree'}", "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    code, out, err = preprocess(*flags, "--suffixes", *spelled)
    assert code == 0 and "2 documents read" in out and "1 file (1 .h) left out" in out, err
    assert preprocess(*flags, "--suffixes", *spelled)[0] == 0
    code, _, err = preprocess(*flags)
    assert code == 2 and "was begun" in err and "--suffixes was" in err


def test_bytes_that_are_no_text_in_names_and_flags(tmp_path: Path, preprocess: Any, tokenizer_file: Path) -> None:
    """A file name of Latin-1 is read, recorded, and listed; a journal or manifest never fails over it."""
    import os

    name = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.jsonl")
    Path(name).write_text('{"content": "x = 1"}\n{"content": 5}\n')
    flags = ["--input", name, "--tokenizer", tokenizer_file, "--output", os.fsdecode(os.fsencode(tmp_path) + b"/\xff")]
    code, _, err = preprocess(*flags, "--validation_fraction", 0)
    assert code == 0, err
    code, out, err = preprocess(*flags, "--validation_fraction", 0)
    assert code == 0 and "nothing to do" in out, err
