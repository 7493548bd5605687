"""verify.py finds every kind of damage and names it."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import change, read_documents, run, write_rows
from tokenizers import Tokenizer

from data.pipeline.writer import SplitWriter
from data.shards import read_index
from data.terminal import drain
from data.verify import _token_faults, main, verify

BIN, IDX = "train/shard_000000.bin", "train/shard_000000.idx"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which every shard here has many."""
    monkeypatch.setattr("data.verify.CHUNK_TOKENS", 50)


def test_sound_shards_verify(sound_shards: Path) -> None:
    assert verify(sound_shards, workers=2) == []
    done = run(sound_shards, script="data/verify.py")
    assert done.returncode == 0 and "all sound" in done.stdout
    assert len(read_documents(sound_shards)) > 20


@pytest.mark.parametrize("fim", [0, 1])
def test_a_text_that_spells_an_end_token_that_is_not_special(
    fim: int, tmp_path: Path, preprocess: Any, tokenizer_text: str
) -> None:
    """Its document ended there, and shards just made were called damaged."""
    content = json.loads(tokenizer_text)
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "end, prefix = '<|endoftext|>', '<fim_prefix>'"
    write_rows(tmp_path / "x.jsonl", [{"content": text}])
    flags = ["--tokenizer", tmp_path / "tokenizer.json", "--validation_fraction", 0, "--fim_rate", fim]
    code, _, err = preprocess("--input", tmp_path / "x.jsonl", "--output", tmp_path / "out", *flags)
    assert code == 0 and verify(tmp_path / "out") == [], err
    (ids,) = read_documents(tmp_path / "out")
    # Without --fim_rate the tokens for it are whatever the file makes of them.
    assert [ids.count(special) for special in range(4)] == [1, 1, fim, fim] and ids[-1] == 0
    if not fim:
        plain = Tokenizer.from_str(tokenizer_text)
        assert plain.decode(ids[:-1], skip_special_tokens=False) == text


def count_one_more(folder: Path, key: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][key] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resum(folder: Path) -> None:
    """Make the manifest's sums right again, so that only the check in question can find the damage."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256")):
            shard[key] = hashlib.sha256((folder / "train" / f"{shard['name']}{suffix}").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def in_place_of_tokenizer(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    make(folder / "tokenizer" / "tokenizer.json")


@pytest.mark.parametrize(
    ("damage", "resummed", "message"),
    [
        (lambda f: change(f / BIN, 100, b"\x05"), False, f"{BIN} has another sha256"),
        (lambda f: change(f / IDX, -1, b"\x01"), False, f"{IDX} has another sha256"),
        (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-2]), False, f"{BIN} has .* bytes and should have"),
        (lambda f: (f / IDX).write_bytes((f / IDX).read_bytes()[:-2]), False, f"{IDX} has .* bytes and should have"),
        (lambda f: (f / BIN).unlink(), False, f"{BIN} is missing"),
        (lambda f: (f / IDX).unlink(), False, f"{IDX} is missing"),
        (lambda f: change(f / IDX, 0, b"X"), True, f"{IDX} is not a Megatron index"),
        (lambda f: change(f / IDX, 9, b"\x02"), True, f"{IDX} disagrees with its manifest"),
        (lambda f: change(f / BIN, 10, b"\xff\xff"), True, f"{BIN}: token 5 is 65535, the vocabulary has 600"),
        (lambda f: change(f / BIN, 200, b"\xff\xff"), True, f"{BIN}: token 100 is 65535, the vocabulary has 600"),
        (lambda f: change(f / BIN, 10, b"\0\0"), True, f"{BIN}: .* end-of-text tokens in .* documents"),
        (lambda f: change(f / BIN, -2, b"\x09\0"), True, f"{BIN}: document .* does not end with the end-of-text token"),
        (lambda f: change(f / IDX, 34, b"\x01\0\0\0"), True, f"{IDX}: documents of .* tokens together"),
        (lambda f: change(f / IDX, -8, b"\x01"), True, f"{IDX}: document numbers that do not count up"),
        (lambda f: (f / "train" / "shard_000099.bin").touch(), False, "shard_000099.bin is not in the manifest"),
        (lambda f: count_one_more(f, "documents"), False, "manifest.json: train has .* documents, its shards"),
        (lambda f: count_one_more(f, "tokens"), False, "manifest.json: train has .* tokens, its shards"),
        (lambda f: count_one_more(f, "text_bytes"), False, "manifest.json: train has .* text_bytes, its shards"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), False, "tokenizer.json cannot be read: No such file"),
        (lambda f: in_place_of_tokenizer(f, os.mkfifo), False, "tokenizer.json cannot be read: not a regular file"),
        (lambda f: in_place_of_tokenizer(f, os.mkdir), False, "tokenizer.json cannot be read: Is a directory$"),
        (
            lambda f: (f / "tokenizer" / "tokenizer.json").write_text("[]"),
            False,
            "tokenizer.json cannot be read: it is not a JSON object",
        ),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text('{"model": 1}'), False, "not the tokenizer these shards"),
    ],
)
def test_verify_names_what_is_wrong(shards: Path, damage: Any, resummed: bool, message: str) -> None:
    damage(shards)
    if resummed:
        resum(shards)
    faults = verify(shards)
    assert any(re.search(message, fault) for fault in faults), faults
    assert all(not re.search("sha256", fault) for fault in faults) or not resummed


@pytest.mark.parametrize("read", ["small_file", "hash_file"])
def test_a_limit_of_this_process_is_no_damage(read: str, sound_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(f"data.verify.{read}", scarce)
    with pytest.raises(OSError, match="Too many open files"):
        verify(sound_shards)


def test_an_id_below_zero_is_named(tmp_path: Path) -> None:
    """Which int32, the dtype of large vocabularies, can hold."""
    writer = SplitWriter(tmp_path, "int32", 100)
    writer.add(np.array([5, -1, 0], np.int32), np.array([3], np.int32), np.array([3]))
    writer.close_shard()
    stem = tmp_path / "shard_000000"
    faults = _token_faults(stem, read_index(stem.with_suffix(".idx")), {"tokenizer": {"vocab_size": 70_000, "eos_token_id": 0}})
    assert list(faults) == [f"{stem}.bin: token 1 is -1, the vocabulary has 70000"]


def test_verify_as_a_command_fails_and_names(shards: Path) -> None:
    change(shards / BIN, 100, b"\x05")
    done = run(shards, script="data/verify.py")
    assert done.returncode == 1 and BIN in done.stderr and "Traceback" not in done.stderr
    done = run(shards / "nowhere", script="data/verify.py")
    assert done.returncode == 2 and "no shards at" in done.stderr and "data/preprocess.py" in done.stderr


def test_every_folder_is_looked_at(shards: Path, sound_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was missing ended the command, and what came after it was taken for sound."""
    (shards / BIN).write_bytes((shards / BIN).read_bytes()[:-2])
    (shards / "train" / "odd\nerror: x").touch()
    assert main([str(shards), str(sound_shards)]) == 1
    assert main([str(tmp_path / "nowhere"), str(shards), str(sound_shards)]) == 1  # damage before a path that is wrong
    assert main([str(tmp_path / "nowhere"), str(sound_shards)]) == 2
    drain()
    said = capsys.readouterr()
    assert said.out.count("all sound") == 3 and said.err.count("odd\\nerror: x is not in the manifest\n") == 2
    assert "no shards at" in said.err and said.err.count("error: ") == said.err.count("\n") + 2
