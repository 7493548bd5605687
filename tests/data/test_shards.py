"""The files on disk are what the format says, damage is refused by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import change

from data.cli import UserError
from data.dataset import PackedDataset
from data.shards import check_header, check_manifest, dtype_for, index_bytes, index_faults, load_manifest, read_index
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


def changed_at(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


SOUND = index_bytes(np.array([5, 1, 2]), "uint16")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a Megatron index"),
        (SOUND[:33], "is not a Megatron index"),
        (changed_at(SOUND, 0, b"X"), "is not a Megatron index"),
        (changed_at(SOUND, 9, b"\x02"), "version 2, dtype code 8, 3 sequences, 4 documents is not what we write"),
        (changed_at(SOUND, 17, b"\x07"), "version 1, dtype code 7, 3 sequences, 4 documents is not what we write"),
        (changed_at(SOUND, 26, b"\x05"), "version 1, dtype code 8, 3 sequences, 5 documents is not what we write"),
        (SOUND + b"\0", "has 103 bytes and should have 102 for 3 documents"),
        (SOUND[:-1], "has 101 bytes and should have 102 for 3 documents"),
    ],
)
def test_an_index_that_is_none_of_ours_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.idx:? {message}"):
        read_index(tmp_path / "x.idx")
    if len(data) != len(SOUND):
        return
    says = "is not a Megatron index" if "Megatron" in message else "disagrees with its manifest"
    with pytest.raises(UserError, match=rf"x\.idx {says}"):
        check_header(tmp_path / "x.idx", "uint16", 3)


@pytest.mark.parametrize(
    ("at", "value", "fault"),
    [
        (34, b"\x06\0\0\0\0\0\0\0", "document 1 has no token"),  # sizes 6, 0, 2: together as many
        (34, b"\x04", "documents of 7 tokens together, the manifest says 8"),
        (46, b"\x02", "offsets that are not the sums of the sizes before them"),
        (54, b"\x0c", "offsets that are not the sums of the sizes before them"),
        (78, b"\x02", "document numbers that do not count up"),
    ],
)
def test_what_of_an_index_does_not_fit_is_named(at: int, value: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    path.write_bytes(SOUND)
    assert list(index_faults(path, read_index(path), 8)) == []
    path.write_bytes(changed_at(SOUND, at, value))
    assert f"{path}: {fault}" in list(index_faults(path, read_index(path), 8))


def small_manifest() -> dict[str, Any]:
    counts = {"documents": 3, "tokens": 8, "text_bytes": 20}
    shard = {"name": "shard_000000", **counts, "bytes": 16, "sha256": "0", "index_sha256": "1"}
    tokenizer = {"fingerprint": "f", "vocab_size": 600, "eos_token_id": 0}
    splits = {split: {**counts, "shards": [dict(shard)]} for split in ("train", "validation")}
    return {"format": "moe-code-gpt-shards", "version": 1, "dtype": "uint16", "tokenizer": tokenizer, "splits": splits}


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield f"{path}{key}"
        yield from keys_of(inner, f"{path}{key}.")


def test_a_manifest_is_refused_without_any_of_its_fields() -> None:
    path = Path("manifest.json")
    assert check_manifest(path, small_manifest()) == small_manifest()
    names = [name for name in keys_of(small_manifest()) if not name.endswith(".0")]
    assert len(names) == 32
    for name in names:
        manifest = small_manifest()
        set_at(manifest, name, None)
        with pytest.raises(UserError, match=r"^manifest\.json (is damaged|has format)"):
            check_manifest(path, manifest)
    with pytest.raises(UserError, match=r"is damaged \(it has no format\)"):
        check_manifest(path, {**small_manifest(), "format": None})
    with pytest.raises(UserError, match=r"has format moe-code-gpt-shards version 2, this program reads .* version 1"):
        check_manifest(path, {**small_manifest(), "version": 2})


def test_a_file_is_no_folder_of_shards(tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").touch()
    with pytest.raises(UserError, match=r"code\.jsonl is a file, not a folder of shards; name the folder, or make one with"):
        load_manifest(tmp_path / "code.jsonl")


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
        *[(f"{SHARD}.name", name, "shards[0].name") for name in OUTSIDE],
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
