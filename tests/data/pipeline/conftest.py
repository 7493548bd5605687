"""A job with everything that keeps state, and its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import run

FILES = ["inputs.jsonl", "manifest.json", "rejected.jsonl", "removed.jsonl"]


@pytest.fixture(scope="session")
def flags(corpus: Path, tokenizer_file: Path) -> list[object]:
    """A job of some ten shards over three files, with everything on that keeps state."""
    data = ["--input", corpus, "--tokenizer", tokenizer_file]
    return [*data, "--shard_tokens", 20_000, "--validation_fraction", 0.2, "--dedup", "near"]


@pytest.fixture(scope="session")
def expected(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "out"
    done = run(*flags, "--output", output, "--workers", 1)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) > 5 and len(manifest["splits"]["validation"]["shards"]) > 1
    assert sorted(p.name for p in output.iterdir()) == [*FILES, "tokenizer", "train", "validation"]
    return output
