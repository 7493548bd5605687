"""Shards on disk: Megatron-LM's IndexedDataset format, version 1, one sequence per document, end of text last in each.

`NAME.bin`  token ids, little endian, uint16 or int32, documents back to back.
`NAME.idx`  magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 sequences n, uint64 documents n + 1,
            int32[n] tokens of each sequence, int64[n] byte offset of each in `.bin`, int64[n + 1] first sequence of each document.
Source: megatron/core/datasets/indexed_dataset.py (_IndexWriter, DType).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}
FORMAT_NAME = "moe-code-gpt-shards"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"


def dtype_for(vocab_size: int) -> str:
    """uint16 where every id fits, else int32 (the next one that Megatron knows and that holds 2^31 ids)."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def fsync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def index_bytes(sizes: np.ndarray, dtype: str) -> bytes:
    """The whole `.idx` file for documents of `sizes` tokens."""
    sizes_64 = sizes.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes_64)[:-1]]).astype("<i8") * np.dtype(dtype).itemsize
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], len(sizes), len(sizes) + 1)
    return b"".join([header, sizes.astype("<i4").tobytes(), offsets.tobytes(), np.arange(len(sizes) + 1, dtype="<i8").tobytes()])


@dataclass(frozen=True)
class Index:
    """A `.idx` file, memory-mapped: `sizes` int32 [n] tokens, `offsets` int64 [n] bytes (unaligned: searchsorted copies)."""

    dtype: str
    sizes: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def index_file_size(documents: int) -> int:
    return HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)


def check_header(path: Path, dtype: str, documents: int) -> None:
    """Refuse an index whose magic, version, dtype or counts are not those of the manifest. Reads 34 bytes."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is not a Megatron index: it does not begin with MMIDIDX")
    expected = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], documents, documents + 1)
    if head != expected:
        found, right = HEADER.unpack(head)[1:], HEADER.unpack(expected)[1:]
        raise ValueError(f"{path} disagrees with its manifest: (version, dtype, counts) are {found} and should be {right}")


def read_index(path: Path) -> Index:
    """Map an index. Raises ValueError that names the file for a wrong magic, version, dtype or length."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    head = data[: HEADER.size].tobytes()
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, n, documents = HEADER.unpack(head)
    names = {c: name for name, c in DTYPE_CODES.items()}
    if version != 1 or code not in names or documents != n + 1:
        raise ValueError(f"{path}: version {version}, dtype code {code}, {n} sequences, {documents} documents is not what we write")
    if len(data) != index_file_size(n):
        raise ValueError(f"{path} has {len(data)} bytes and should have {index_file_size(n)} for {n} documents")
    sizes_end, offsets_end = HEADER.size + 4 * n, HEADER.size + 12 * n
    return Index(
        dtype=names[code],
        sizes=data[HEADER.size : sizes_end].view("<i4"),
        offsets=data[sizes_end:offsets_end].view("<i8"),
        documents=data[offsets_end:].view("<i8"),
    )


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder. FileNotFoundError where there is none, ValueError where it is not ours."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "an unfinished job: run its command again" if (folder / "state.json").exists() else "no manifest.json there"
        make = f"make them with python data/preprocess.py --input ... --output {folder}"
        raise FileNotFoundError(f"no shards at {folder}: {what}; {make}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        name, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise ValueError(f"{path} has format {name} version {version}, this program reads {FORMAT_NAME} version {FORMAT_VERSION}")
    return manifest


def shard_name(number: int) -> str:
    return f"shard_{number:06d}"


def check_shard(folder: Path, split: str, shard: dict[str, Any], dtype: str) -> None:
    """Structure and sizes, not sums: two stats and 34 bytes. Raises ValueError or FileNotFoundError that names the file."""
    stem = folder / split / shard["name"]
    sizes = {".bin": shard["tokens"] * np.dtype(dtype).itemsize, ".idx": index_file_size(shard["documents"])}
    for suffix, expected in sizes.items():
        path = stem.with_suffix(suffix)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"shard file {path} is missing; the manifest lists it") from None
        if size != expected:
            raise ValueError(f"{path} has {size} bytes and should have {expected}: it is damaged; preprocess again or restore it")
    check_header(stem.with_suffix(".idx"), dtype, shard["documents"])
