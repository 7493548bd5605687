"""Shards on disk: Megatron-LM's IndexedDataset format, version 1, one sequence per document, end of text last in each.

`NAME.bin`  token ids, little endian, uint16 or int32, documents back to back.
`NAME.idx`  magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 sequences n, uint64 documents n + 1,
            int32[n] tokens of each sequence, int64[n] byte offset of each in `.bin`, int64[n + 1] first sequence of each document.
Source: megatron/core/datasets/indexed_dataset.py (_IndexWriter, DType).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import NotFound, UserError, sentence
from data.files import is_inside, read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}
FORMAT_NAME = "moe-code-gpt-shards"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
#: Of a manifest or a job's state, which list every shard, some 350 bytes each, and every input: twelve million shards.
LISTING_BYTES = 1 << 32


def dtype_for(vocab_size: int) -> str:
    """uint16 where every id fits, else int32 (the next one that Megatron knows and that holds 2^31 ids)."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


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
        raise UserError(f"{path} is not a Megatron index: it does not begin with MMIDIDX")
    expected = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], documents, documents + 1)
    if head != expected:
        found, right = HEADER.unpack(head)[1:], HEADER.unpack(expected)[1:]
        raise UserError(f"{path} disagrees with its manifest: (version, dtype, counts) are {found} and should be {right}")


def read_index(path: Path) -> Index:
    """Map an index. Raises UserError that names the file for a wrong magic, version, dtype or length."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    head = data[: HEADER.size].tobytes()
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, n, documents = HEADER.unpack(head)
    names = {c: name for name, c in DTYPE_CODES.items()}
    if version != 1 or code not in names or documents != n + 1:
        raise UserError(f"{path}: version {version}, dtype code {code}, {n} sequences, {documents} documents is not what we write")
    if len(data) != index_file_size(n):
        raise UserError(f"{path} has {len(data)} bytes and should have {index_file_size(n)} for {n} documents")
    sizes_end, offsets_end = HEADER.size + 4 * n, HEADER.size + 12 * n
    return Index(
        dtype=names[code],
        sizes=data[HEADER.size : sizes_end].view("<i4"),
        offsets=data[sizes_end:offsets_end].view("<i8"),
        documents=data[offsets_end:].view("<i8"),
    )


def index_faults(path: Path, index: Index, tokens: int) -> Iterator[str]:
    """What of an index does not fit a shard of `tokens` tokens, as sentences that name the file. Reads all of it."""
    sizes = index.sizes.astype(np.int64)
    if (sizes < 1).any():
        yield f"{path}: document {int(np.argmax(sizes < 1))} has no token"
    if int(sizes.sum()) != tokens:
        yield f"{path}: documents of {int(sizes.sum())} tokens together, the manifest says {tokens}"
    if not np.array_equal(index.offsets, (np.cumsum(sizes) - sizes) * np.dtype(index.dtype).itemsize):
        yield f"{path}: offsets that are not the sums of the sizes before them"
    if not np.array_equal(index.documents, np.arange(len(sizes) + 1)):
        yield f"{path}: document numbers that do not count up"


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder. Raises NotFound where there is none, UserError where it is not ours."""
    if folder.is_file():
        make = f"name the folder, or make one with python data/preprocess.py --input {folder} --output shards/"
        raise UserError(f"{folder} is a file, not a folder of shards; {make}")
    path = folder / MANIFEST
    if not path.is_file():
        what = "an unfinished job: run its command again" if (folder / "state.json").exists() else "no manifest.json there"
        make = f"make them with python data/preprocess.py --input ... --output {folder}"
        raise NotFound(f"no shards at {folder}: {what}; {make}")
    try:
        manifest = read_json(path, LISTING_BYTES)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({sentence(error)})") from error
    return check_manifest(path, manifest)


def check_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    """The manifest if it makes sense: format, types, sizes, and names of files inside its folder. Raises UserError."""
    fields = manifest if isinstance(manifest, dict) else {}
    name, version = fields.get("format"), fields.get("version")
    if name is None:
        raise UserError(f"{path} is damaged (it has no format)")
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise UserError(f"{path} has format {name} version {version}, this program reads {FORMAT_NAME} version {FORMAT_VERSION}")
    for where, good in _checks(fields):
        if not good:
            raise UserError(f"{path} is damaged: {where} is missing or makes no sense; restore it, or preprocess again")
    return fields


def _checks(manifest: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(what was looked at, whether it is as it must be), in an order in which each check may rely on those before it."""
    yield "dtype", manifest.get("dtype") in DTYPE_CODES
    tokenizer = manifest.get("tokenizer")
    yield "tokenizer", isinstance(tokenizer, dict) and isinstance(tokenizer.get("fingerprint"), str)
    assert isinstance(tokenizer, dict)
    yield "tokenizer.vocab_size", _is_count(tokenizer.get("vocab_size")) and tokenizer["vocab_size"] > 0
    yield "tokenizer.eos_token_id", _is_count(end := tokenizer.get("eos_token_id")) and end < tokenizer["vocab_size"]
    splits = manifest.get("splits")
    for split in SPLITS:
        entry = splits.get(split) if isinstance(splits, dict) else None
        yield f"splits.{split}", isinstance(entry, dict) and isinstance(entry.get("shards"), list)
        assert isinstance(entry, dict)
        yield f"splits.{split}", all(_is_count(entry.get(key)) for key in ("documents", "tokens", "text_bytes"))
        names = set[str]()
        for number, shard in enumerate(entry["shards"]):
            where = f"splits.{split}.shards[{number}]"
            yield (
                where,
                isinstance(shard, dict) and all(_is_count(shard.get(k)) for k in ("documents", "tokens", "text_bytes", "bytes")),
            )
            yield f"{where}.sha256", all(isinstance(shard.get(key), str) for key in ("sha256", "index_sha256"))
            # A manifest of somebody else must not make us read (or hash without end) what lies outside its folder.
            yield f"{where}.name", is_inside(shard.get("name")) and "/" not in shard["name"]
            yield f"{where}.name, which comes twice,", shard["name"] not in names
            names.add(shard["name"])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def shard_name(number: int) -> str:
    return f"shard_{number:06d}"


def check_shard(folder: Path, split: str, shard: dict[str, Any], dtype: str) -> None:
    """Structure and sizes, not checksums: two stats and 34 bytes. Raises UserError or NotFound that names the file."""
    stem = folder / split / shard["name"]
    sizes = {".bin": shard["tokens"] * np.dtype(dtype).itemsize, ".idx": index_file_size(shard["documents"])}
    for suffix, expected in sizes.items():
        path = stem.with_suffix(suffix)
        try:
            status = path.stat()
        except FileNotFoundError:
            raise NotFound(f"shard file {path} is missing; the manifest lists it") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file")
        if (size := status.st_size) != expected:
            raise UserError(f"{path} has {size} bytes and should have {expected}: it is damaged; preprocess again or restore it")
    check_header(stem.with_suffix(".idx"), dtype, shard["documents"])
