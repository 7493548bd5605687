"""The files on disk are what the format says, damage is refused by name."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import change

from data.cli import UserError
from data.dataset import PackedDataset
from data.shards import dtype_for, index_bytes, load_manifest
from data.verify import verify


def test_index_is_the_format_byte_by_byte() -> None:
    """Against bytes written out by hand from the format's description."""
    right = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", 5, 1, 2)
    right += struct.pack("<3q", 0, 10, 12) + struct.pack("<4q", 0, 1, 2, 3)
    assert index_bytes(np.array([5, 1, 2]), "uint16") == right
    assert index_bytes(np.array([5, 1, 2]), "int32")[:34] == b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    assert struct.unpack_from("<3q", index_bytes(np.array([5, 1, 2]), "int32"), 46) == (0, 20, 24)


def test_dtype_holds_the_largest_id() -> None:
    assert [dtype_for(n) for n in (600, 65_536, 65_537, 200_000)] == ["uint16", "uint16", "int32", "int32"]


BIN, IDX = "train/shard_000000.bin", "train/shard_000000.idx"


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


def test_manifest_of_a_complete_folder_has_what_training_compares(sound_shards: Path) -> None:
    manifest = load_manifest(sound_shards)
    assert set(manifest["tokenizer"]) == {"name", "fingerprint", "vocab_size", "eos_token", "eos_token_id", "fim"}
    assert manifest["format"] == "moe-code-gpt-shards" and manifest["version"] == 1


def set_at(manifest: dict[str, Any], path: str, value: object) -> None:
    *outer, last = path.split(".")
    here: Any = manifest
    for key in outer:
        here = here[int(key)] if isinstance(here, list) else here[key]
    here[last] = value


SHARD = "splits.train.shards.0"
OUTSIDE = ("/dev/zero", "../outside", "a/b", "..", "", "x\0", 5, None, ["x"])


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        *[
            (f"{SHARD}.name", name, "shards[0].name")
            for name in ("/dev/zero", "../outside", "a/b", "..", "", "x\0", 5, None, ["x"])
        ],
        *[(f"{SHARD}.tokens", value, "shards[0]") for value in (-1, 1.5, "8", None, True, 2**63, [])],
        (f"{SHARD}.sha256", None, "shards[0].sha256"),
        (SHARD.removesuffix(".0"), {}, "splits.train"),
        (SHARD.removesuffix(".0"), [5], "shards[0]"),
        ("splits.validation", None, "splits.validation"),
        ("splits.train.tokens", "many", "splits.train"),
        ("splits", [], "splits.train"),
        ("dtype", "float64", "dtype"),
        ("dtype", None, "dtype"),
        ("tokenizer", "x", "tokenizer"),
        ("tokenizer.fingerprint", 5, "tokenizer"),
        ("tokenizer.vocab_size", 0, "tokenizer.vocab_size"),
        ("tokenizer.vocab_size", 2**70, "tokenizer.vocab_size"),
        ("tokenizer.eos_token_id", -1, "tokenizer.eos_token_id"),
        ("tokenizer.eos_token_id", 600, "tokenizer.eos_token_id"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_by_its_field(shards: Path, path: str, value: object, named: str) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    set_at(manifest, path, value)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    for use in (lambda: PackedDataset([shards], split="train", sequence_length=64), lambda: verify(shards)):
        with pytest.raises(UserError, match=rf"manifest\.json is damaged: (splits\.train\.)?{re.escape(named)} is"):
            use()


@pytest.mark.parametrize("content", ["[" * 10**6, "null", "[]", "5", "\ud800", '{"format": {}}', b"\xff\xfe"])
def test_a_manifest_of_anything_is_one_sentence(shards: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    (shards / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json (is damaged|has format)"):
        load_manifest(shards)


def test_a_shard_that_is_no_file_is_refused_and_not_read(shards: Path) -> None:
    import os

    (shards / BIN).unlink()
    os.mkfifo(shards / BIN)
    with pytest.raises(UserError, match=f"{BIN} is not a regular file"):
        PackedDataset([shards], split="train", sequence_length=64)


def test_a_manifest_that_names_a_shard_a_hundred_thousand_times_is_refused(shards: Path) -> None:
    """Each would be verified: days of work by a file of some MB."""
    manifest = json.loads((shards / "manifest.json").read_text())
    listed = manifest["splits"]["train"]["shards"]
    listed += listed * 100_000
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"damaged: splits\.train\.shards\[\d+\]\.name, which comes twice, is"):
        verify(shards)
