"""Every legal beginning of what is read is read; everything else is named, once, with what to do, and never half read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pytest
from data_helpers import compress, json_lines, read_file, skippable_frame, zstd_frame

from data.pointers import POINTERS
from data.sources.formats import NOT_READ

TEXTS = [f"def f{i}(a, b):\n    return a * {i} + b\n" * 5 for i in range(100)]
LINES = json_lines(TEXTS)
EMPTY_GZIP = gzip.compress(b"")
HALF = LINES.index(b"\n", len(LINES) // 2) + 1


def gzip_with_fields(data: bytes) -> bytes:
    """Extra field, file name, comment and header checksum, as RFC 1952 allows all at once (bgzip writes extra fields)."""
    body = gzip.compress(data)[10:]
    header = b"\x1f\x8b\x08" + bytes([2 | 4 | 8 | 16]) + bytes(4) + b"\x00\xff"
    header += struct.pack("<H", 6) + b"BC\x02\x00\x1b\x00" + b"name.json\x00" + b"comment\x00"
    return header + struct.pack("<H", zlib.crc32(header) & 0xFFFF) + body


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "plain": LINES,
        "byte order mark": b"\xef\xbb\xbf" + LINES,
        "blank lines first": b"\n\r\n  \n" + LINES,
        "gzip": gzip.compress(LINES),
        "gzip with all fields": gzip_with_fields(LINES),
        "gzip members, one empty, padding": gzip.compress(b"")
        + gzip.compress(LINES[:HALF])
        + b"\0" * 700
        + gzip.compress(LINES[HALF:]),
        "gzip that begins with an empty member and padding": EMPTY_GZIP + b"\0" * 9 + gzip.compress(LINES),
        "zstd": compress(LINES, "zst"),
        "zstd behind a skippable frame": skippable_frame(b"\x39\x30\0\0") + compress(LINES, "zst"),
        "zstd behind many, of every number": b"".join(skippable_frame(b"x" * n, n) for n in range(16)) + compress(LINES, "zst"),
        "zstd with a skippable frame at the end (seekable format)": compress(LINES, "zst") + skippable_frame(b"y" * 300),
        "zstd frames with one skippable and one empty between": compress(LINES[:HALF], "zst")
        + skippable_frame(b"")
        + zstd_frame(b"")
        + zstd_frame(LINES[HALF:]),
        "zstd with a window of 128 MiB": zstd_frame(LINES, 27),
        "bzip2": bz2.compress(LINES),
        "bzip2 streams, one empty": bz2.compress(b"") + bz2.compress(LINES[:HALF], 1) + bz2.compress(LINES[HALF:]),
        "xz": lzma.compress(LINES),
        "xz streams and padding": lzma.compress(LINES[:HALF], check=lzma.CHECK_CRC32) + b"\0" * 8 + lzma.compress(LINES[HALF:]),
        "xz without a checksum": lzma.compress(LINES, check=lzma.CHECK_NONE),
    }.items(),
)
def test_every_legal_beginning_is_read(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert read_file(tmp_path / "x") == (TEXTS, []), name


#: Frame header: dictionary id of one byte, window of 1 MiB, dictionary 7.
NEEDS_DICTIONARY = struct.pack("<IBBB", 0xFD2FB528, 1, 80, 7) + bytes(9)


def of_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.jsonl", LINES)
    return file.getvalue()


def of_arrow(stream: bool) -> bytes:
    table, sink = pa.table({"content": TEXTS}), io.BytesIO()
    with (ipc.new_stream if stream else ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def of_feather() -> bytes:
    sink = io.BytesIO()
    feather.write_feather(pa.table({"content": TEXTS}), sink)
    return sink.getvalue()


def of_numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([1, 2]))
    return file.getvalue()


def of_sqlite(tmp_path: Path) -> bytes:
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute("create table t (content text)")
    return (tmp_path / "db").read_bytes()


ARRAY = json.dumps([{"content": t} for t in TEXTS])
PRETTY = "\n".join(json.dumps({"content": t}, indent=2) for t in TEXTS).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

NAMED: dict[str, tuple[bytes, str, str]] = {
    "zip": (of_zip(), "zip archive", "unpack it"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "zip archive", "unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "7z archive", "unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(100), "RAR archive", "unpack it"),
    "lz4": (bytes(pa.compress(LINES, "lz4", asbytes=True)), "LZ4 data", "decompress it"),
    "lzma alone": (lzma.compress(LINES, lzma.FORMAT_ALONE), "LZMA data", "decompress it"),
    "zlib": (zlib.compress(LINES), "zlib data", "decompress it"),
    "compress": (b"\x1f\x9d\x90" + bytes(50), "compress (.Z) data", "decompress it"),
    "arrow file": (of_arrow(stream=False), "Arrow IPC", "convert it to Parquet"),
    "arrow stream": (of_arrow(stream=True), "Arrow IPC stream", "convert it to Parquet"),
    "feather 1": (b"FEA1" + bytes(100) + b"FEA1", "Feather file", "convert it to Parquet"),
    "feather 2": (of_feather(), "Arrow IPC (Feather)", "convert it to Parquet"),
    "avro": (b"Obj\x01" + bytes(100), "Avro file", "convert it to Parquet"),
    "orc": (b"ORC\n\x03" + bytes(100), "ORC file", "convert it to Parquet"),
    "lance": (b"\x01\x02\x03" * 100 + b"LANC", "Lance file", "convert it to Parquet"),
    "pickle": (pickle.dumps(TEXTS), "pickle", "never loaded"),
    "pickle 2": (pickle.dumps(TEXTS, 2), "pickle", "never loaded"),
    "numpy": (of_numpy(), "NumPy array", "convert it"),
    "encrypted Parquet": (b"PARE" + bytes(100) + b"PARE", "Parquet file with an encrypted footer", "without encryption"),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": (LINES.decode().encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE"),
    "UTF-16BE without a mark": (LINES.decode().encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE"),
    "UTF-32": (LINES.decode().encode("utf-32"), "UTF-32 text", "iconv -f UTF-32 "),
    "UTF-32BE without a mark": (LINES.decode().encode("utf-32-be"), "UTF-32BE text", "iconv -f UTF-32BE"),
    "JSON array": (ARRAY.encode(), "JSON array", "jq -c '.[]'"),
    "JSON array over lines": (json.dumps([{"content": t} for t in TEXTS], indent=1).encode(), "JSON array", "jq -c '.[]'"),
    "JSON array, an object a line": (ARRAY.replace("}, {", "},\n{").encode(), "JSON array", "jq -c '.[]'"),
    "JSON array, brackets alone": (("[\n" + ARRAY[1:-1].replace("}, {", "},\n{") + "\n]").encode(), "JSON array", "jq -c '.[]'"),
    "JSON array, its last object alone": (
        ("[" + ARRAY[1:-1].replace("}, {", "},\n{") + "\n]").encode(),
        "JSON array",
        "jq -c '.[]'",
    ),
    "pretty-printed": (PRETTY, "JSON over several lines", "jq -c ."),
    "one pretty-printed object": (json.dumps({"content": "x"}, indent=4).encode(), "JSON over several lines", "jq -c ."),
    "objects in a row": (LINES.replace(b"\n", b""), "JSON objects with nothing between them", "jq -c ."),
    "carriage returns": (LINES.replace(b"\n", b"\r"), "JSON objects with carriage returns between them", "jq -c ."),
    "git-LFS": (LFS, "git-LFS pointer", "git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s12--0.jsonl\n", "git-annex pointer", "git annex get"),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n", "HTML or XML page", "download it again"),
    "HTML with JSON-LD": (
        b'<html>\n<script type="application/ld+json">\n{"a": 1}\n</script>\n</html>\n',
        "HTML or XML page",
        "download",
    ),
    "HTML behind blanks": (b"\n\n  <html>\n" + b"<p>x</p>\n" * 500, "HTML or XML page", "download it again"),
    "an XML error of S3": (
        b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
        "HTML or XML page",
        "download it again",
    ),
    "CSV": (b"content,license\n" + b'"x = 1",mit\n' * 400, "not JSON Lines", "none of its first 401 lines is a JSON object"),
    "Python": (b"import os\n" * 300, "not JSON Lines", "tree:FOLDER"),
    "arrays a line": (b"[1, 2]\n" * 300, "not JSON Lines", "none of its first 300 lines"),
    "random bytes": (np.random.default_rng(0).bytes(5000).replace(b"\n", b"x"), "not JSON Lines", "binary data"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("wrap", [None, "gz"])
def test_what_is_not_read_is_named_once_with_what_to_do(name: str, wrap: str | None, tmp_path: Path) -> None:
    """As it is, and inside gzip, where only the decompressed bytes tell."""
    if wrap and name == "lance":
        pytest.skip("its mark is at the end")
    data, kind, remedy = NAMED[name]
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(data) if wrap else data)
    texts, rejections = read_file(tmp_path / "x.jsonl")
    assert texts == [] and len(rejections) == 1, rejections[:3]
    assert rejections[0].line is None and kind in rejections[0].kind and remedy in rejections[0].detail, rejections


def test_an_sqlite_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(of_sqlite(tmp_path))
    assert [r.kind for r in read_file(tmp_path / "x.jsonl")[1]] == ["SQLite database, which is not read"]


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("gzip in gzip", lambda: gzip.compress(gzip.compress(LINES)), "data that was compressed twice"),
        ("zstd in xz", lambda: lzma.compress(compress(LINES, "zst")), "data that was compressed twice"),
        ("empty", lambda: b"", "empty file"),
        ("empty gzip", lambda: EMPTY_GZIP, "empty file"),
        ("a mark alone", lambda: b"\xef\xbb\xbf", "empty file"),
        ("blank lines alone", lambda: gzip.compress(b"\n \r\n"), "empty file"),
        ("zstd with a window of 2 GiB", lambda: zstd_frame(LINES, 31), "zstd data with a window of more than 128 MiB"),
        ("zstd before 0.8", lambda: b"\x27\xb5\x2f\xfd" + bytes(50), "zstd data of a version before 0.8"),
        (
            "zstd with a dictionary",
            lambda: NEEDS_DICTIONARY,
            "zstd data that needs a dictionary",
        ),
    ],
)
def test_what_is_sound_and_beyond_a_limit_is_not_called_damaged(
    name: str, make: Callable[[], bytes], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(make())
    texts, rejections = read_file(tmp_path / "x.jsonl")
    assert texts == [] and [kind in r.kind for r in rejections] == [True], (name, rejections)


def test_an_xz_file_that_needs_more_memory_than_allowed(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    (tmp_path / "x").write_bytes(lzma.compress(b"", filters=filters) + lzma.compress(LINES, filters=filters))
    assert [r.kind for r in read_file(tmp_path / "x")[1]] == ["xz data that needs more than 256 MiB to be decompressed"]


@pytest.mark.parametrize(
    "first",
    [
        b"{bad",
        b"[1, 2, 3]",
        b"{",
        b'"DUCK"',
        b"42",
        b"\xff\xfe",
        b'{"txt":"DUCKS"',
        b"{}{}",
        b"BZh",
        b"ORCHID",
        b'<div>\\n</div>"}',  # what `split -b` leaves of a row
        b'[1, foo"}',
        b"[INFO] 100 rows",
    ],
)
def test_a_broken_first_line_costs_itself_alone(first: bytes, tmp_path: Path) -> None:
    if first in (b"\xff\xfe", b"ORCHID"):
        first = b"x" + first  # at the very beginning they say what the file is
    (tmp_path / "x.jsonl").write_bytes(first + b"\n" + LINES)
    texts, rejections = read_file(tmp_path / "x.jsonl")
    assert texts == TEXTS and [r.line for r in rejections] == [1]


@pytest.mark.parametrize("known", [*NOT_READ, *POINTERS], ids=lambda known: known.name)
def test_no_mark_of_a_format_can_begin_json_lines(known: object) -> None:
    assert not known.magic.startswith((b"{", b"[", b" ", b"\n")) and known.remedy  # type: ignore[attr-defined]


def test_source_files_that_stand_for_others_are_named(tmp_path: Path, preprocess: Callable, tokenizer_file: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    files = {
        "a.py": b"x = 1\n",
        "b.py": LFS,
        "c\nerror.py": "x = 2\n".encode("utf-16"),
        "d.py": b"ORC = 1\nPK = 2\n",
        "._a.py": b"\0\5\x16\7",
    }
    for name, data in files.items():
        (tree / name).write_bytes(data)
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    code, out, err = preprocess("--input", f"tree:{tree}", *flags)
    assert code == 0, err
    assert "rejected 1: git-LFS pointer" in out and "rejected 1: UTF-16 text" in out
    assert f"warning: {tree}/c\\nerror.py: UTF-16 text" in err and err.count("\n") == 2
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]["read"] == 4
