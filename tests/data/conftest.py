"""A small corpus, a tokenizer trained on it, and the preprocessing command, for all tests of the data stage."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import run, shared_data, write_rows

from data.tokens import tokenizer as tokenizers


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 files of the standard library, at most 20 kB each: real code."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.glob("*.py") if 100 < p.stat().st_size < 20_000)
    return [p.read_text(encoding="utf-8") for p in files[:60]]


@pytest.fixture
def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Of a table, a text each."""
    return [{"content": t, "license": "mit" if i % 3 else "gpl", "size": i} for i, t in enumerate(texts)]


@pytest.fixture(scope="session")
def tokenizer_text(texts: list[str]) -> str:
    return tokenizers.train(texts, 600)


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def starcoder2() -> str:
    return (shared_data("tokenizer") / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of rows in CodeParrot-clean's schema."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        rows = [{"content": t, "license": "mit", "repo_name": "r", "path": "p.py"} for t in texts[number::3]]
        write_rows(folder / f"file-{number}.json.gz", rows)
    return folder


@pytest.fixture
def preprocess(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process (faster): (exit code, stdout, stderr)."""
    from data.preprocess import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        line = [str(a) for a in arguments]
        if "--workers" not in line:
            line += ["--workers", "1"]
        code = main(line)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def sound_shards(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    flags = ["--input", corpus, "--tokenizer", tokenizer_file, "--output", output, "--shard_tokens", 60_000]
    done = run(*flags, "--validation_fraction", 0.2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def shards(sound_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_shards, tmp_path / "shards"))
