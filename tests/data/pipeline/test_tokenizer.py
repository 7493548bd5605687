"""The sample that a tokenizer is trained on comes from all over the input and is bounded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from data_helpers import write_rows

from data.pipeline import tokenizer
from data.pipeline.arguments import PreprocessArguments
from data.pipeline.tokenizer import sample_texts, spread
from data.sources.discover import find_sources


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 1000])
def test_spread_takes_at_most_so_many_at_equal_distances(count: int) -> None:
    found = spread(range(count), 32)
    assert len(found) <= 32 and len(found) >= min(count, 16)
    assert len({b - a for a, b in itertools.pairwise(found)}) <= 1


def test_every_source_gives_an_equal_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SAMPLE_BYTES", 3000)
    for letter in "abc":
        write_rows(tmp_path / f"{letter}.jsonl", [{"content": letter * 90}] * 100)
    args = PreprocessArguments(input=(str(tmp_path),), output=tmp_path / "out", train_tokenizer=300)
    text = "".join(sample_texts(args, find_sources(args.input)))
    assert {letter: text.count(letter) for letter in "abc"} == {"a": 1000, "b": 1000, "c": 1000}
