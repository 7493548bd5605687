"""The files on disk are what the format says, damage is refused by name, and verify.py finds every kind of it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import read_documents, run

from data.dataset import PackedDataset
from data.shards import dtype_for, index_bytes, load_manifest, read_index
from data.verify import verify
from data.writer import SplitWriter


@pytest.fixture(scope="module")
def sound(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    flags = ["--input", corpus, "--tokenizer", tokenizer_file, "--output", output, "--shard_tokens", 60_000]
    done = run(*flags, "--validation_fraction", 0.2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def test_index_is_the_format_byte_by_byte() -> None:
    """Against bytes written out by hand from the format's description."""
    right = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", 5, 1, 2)
    right += struct.pack("<3q", 0, 10, 12) + struct.pack("<4q", 0, 1, 2, 3)
    assert index_bytes(np.array([5, 1, 2]), "uint16") == right
    assert index_bytes(np.array([5, 1, 2]), "int32")[:34] == b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    assert struct.unpack_from("<3q", index_bytes(np.array([5, 1, 2]), "int32"), 46) == (0, 20, 24)


def test_dtype_holds_the_largest_id() -> None:
    assert [dtype_for(n) for n in (600, 65_536, 65_537, 200_000)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path: Path, batch: int) -> None:
    sizes = np.array([4, 3, 5, 20, 1, 1, 8, 2, 10, 1], np.int32)
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    ends = np.cumsum(sizes)
    writer = SplitWriter(tmp_path, "uint16", 10)
    for at in range(0, len(sizes), batch):
        upto = min(at + batch, len(sizes))
        part = tokens[ends[at] - sizes[at] : ends[upto - 1]]
        writer.add(part, sizes[at:upto], sizes[at:upto].astype(np.int64) * 3)
    writer.close_shard()
    assert [s["tokens"] for s in writer.shards] == [12, 20, 10, 12, 1]
    assert [s["text_bytes"] for s in writer.shards] == [36, 60, 30, 36, 3]
    written = b"".join((tmp_path / f"{s['name']}.bin").read_bytes() for s in writer.shards)
    assert written == tokens.tobytes()
    found = [read_index(tmp_path / f"{s['name']}.idx").sizes.tolist() for s in writer.shards]
    assert found == [[4, 3, 5], [20], [1, 1, 8], [2, 10], [1]]


def test_sound_shards_verify(sound: Path) -> None:
    assert verify(sound, workers=2) == []
    done = run(sound, script="data/verify.py")
    assert done.returncode == 0 and "all sound" in done.stdout
    assert len(read_documents(sound)) > 20


def change(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    start = at if at >= 0 else len(data) + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


def resum(folder: Path) -> None:
    """Make the manifest's sums right again, so that only the check in question can find the damage."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256")):
            shard[key] = hashlib.sha256((folder / "train" / f"{shard['name']}{suffix}").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


BIN, IDX = "train/shard_000000.bin", "train/shard_000000.idx"


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
        (lambda f: change(f / BIN, 10, b"\0\0"), True, f"{BIN}: .* end-of-text tokens in .* documents"),
        (lambda f: change(f / BIN, -2, b"\x09\0"), True, f"{BIN}: document .* does not end with the end-of-text token"),
        (lambda f: change(f / IDX, 34, b"\x01\0\0\0"), True, f"{IDX}: documents of .* tokens together"),
        (lambda f: change(f / IDX, -8, b"\x01"), True, f"{IDX}: document numbers that do not count up"),
        (lambda f: (f / "train" / "shard_000099.bin").touch(), False, "shard_000099.bin is not in the manifest"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), False, "tokenizer.json cannot be read"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text('{"model": 1}'), False, "not the tokenizer these shards"),
    ],
)
def test_verify_names_what_is_wrong(shards: Path, damage: Any, resummed: bool, message: str) -> None:
    import re

    damage(shards)
    if resummed:
        resum(shards)
    faults = verify(shards)
    assert any(re.search(message, fault) for fault in faults), faults
    assert all(not re.search("sha256", fault) for fault in faults) or not resummed


def test_verify_as_a_command_fails_and_names(shards: Path) -> None:
    change(shards / BIN, 100, b"\x05")
    done = run(shards, script="data/verify.py")
    assert done.returncode == 1 and BIN in done.stderr and "Traceback" not in done.stderr
    done = run(shards / "nowhere", script="data/verify.py")
    assert done.returncode == 2 and "no shards at" in done.stderr and "data/preprocess.py" in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-2]), f"{BIN} has .* should have"),
        (lambda f: (f / IDX).write_bytes((f / IDX).read_bytes() + b"x"), f"{IDX} has .* should have"),
        (lambda f: (f / BIN).unlink(), f"{BIN} is missing"),
        (lambda f: change(f / IDX, 17, b"\x04"), f"{IDX} disagrees with its manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": "other", "version": 1}'), "has format other version 1"),
        (lambda f: (f / "manifest.json").unlink(), "no shards at .*make them with python data/preprocess.py"),
        (lambda f: (f / "manifest.json").rename(f / "state.json"), "an unfinished job"),
    ],
)
def test_training_refuses_damage_by_name(shards: Path, damage: Any, message: str) -> None:
    damage(shards)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PackedDataset([shards], split="train", sequence_length=64)


def test_manifest_of_a_complete_folder_has_what_training_compares(sound: Path) -> None:
    manifest = load_manifest(sound)
    assert set(manifest["tokenizer"]) == {"name", "fingerprint", "vocab_size", "eos_token", "eos_token_id", "fim"}
    assert manifest["format"] == "moe-code-gpt-shards" and manifest["version"] == 1
