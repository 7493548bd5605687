"""Parquet as others write it: any way to hold a string, any layout; a bad byte costs its value, a bomb costs no memory."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import environment, read_documents, read_file, write_rows
from support import ROOT

from data.sources import blocks, parquet
from data.sources.blocks import ReadOptions
from data.sources.discover import Source
from data.sources.read import read_blocks

TEXTS = [f"def f{i}(é, b):\n    return a * {i} + b\n" * 5 for i in range(30)]
BAD = [b'x = "\xff"\n' * 5 if i == 7 else text.encode() for i, text in enumerate(TEXTS)]
GOOD = [text for i, text in enumerate(TEXTS) if i != 7]


def as_kind(values: list[bytes | None], kind: Any) -> pa.Array:
    """The bytes under any type, valid or not: no cast checks them."""
    if pa.types.is_dictionary(kind):
        array = pa.array(values, pa.binary()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(array.indices, as_kind(array.dictionary.to_pylist(), kind.value_type))
    binary = {"string": pa.binary(), "large_string": pa.large_binary(), "string_view": pa.binary_view()}
    plain = pa.array(values, binary.get(str(kind), kind))
    return pa.Array.from_buffers(kind, len(plain), plain.buffers(), plain.null_count)


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
KINDS += [pa.dictionary(pa.int32(), kind) for kind in (pa.string(), pa.large_string(), pa.binary())]
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"use_dictionary": False},
    {"store_schema": False},
    {"compression": "zstd", "row_group_size": 7},
]
LAYOUTS += [{"data_page_version": "2.0"}, {"column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_kind_of_string_with_one_bad_byte(kind: Any, layout: dict[str, Any], tmp_path: Path) -> None:
    """Eventual-Inc/Daft#2845: one invalid byte in a dictionary was called a damaged file; 29 of 30 are right."""
    if "column_encoding" in layout and pa.types.is_dictionary(kind):
        layout = {**layout, "store_schema": False}  # what pyarrow writes otherwise it does not read itself
    pq.write_table(pa.table({"content": as_kind(list(BAD), kind)}), tmp_path / "x.parquet", **layout)
    texts, rejections = read_file(tmp_path / "x.parquet")
    assert texts == GOOD
    assert [(r.line, r.kind) for r in rejections] == [(8, "not UTF-8")]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.string())], ids=str)
def test_a_bad_byte_in_another_column_costs_that_value(
    kind: Any, tmp_path: Path, preprocess: Callable, tokenizer_file: Path
) -> None:
    values = [b"mit" if i != 3 else b"mi\xfft" for i in range(30)]
    if pa.types.is_list(kind):
        license = pa.ListArray.from_arrays(pa.array(range(31), pa.int32()), as_kind(list(values), pa.string()))
    else:
        license = as_kind(list(values), kind)
    pq.write_table(pa.table({"content": TEXTS, "license": license}), tmp_path / "x.parquet")
    assert read_file(tmp_path / "x.parquet") == (TEXTS, [])
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0, "--licenses", "mit"]
    code, out, err = preprocess("--input", tmp_path / "x.parquet", *flags)
    assert code == 0 and "removed 1: license not in --licenses" in out, err
    assert len(read_documents(tmp_path / "out")) == 29


def test_a_value_that_python_cannot_hold_costs_itself(tmp_path: Path) -> None:
    far = pa.array([2**62] * 30, pa.timestamp("us"))
    pq.write_table(pa.table({"content": TEXTS, "license": far}), tmp_path / "x.parquet")
    columns = ("content", "license")
    assert read_file(tmp_path / "x.parquet", columns=columns) == (TEXTS, [])


@pytest.mark.parametrize("name", ["meta.content", "a.b.content", "meta.x"])
def test_nested_names(name: str, tmp_path: Path) -> None:
    """A struct in the file, or a column whose name has the dots; with other columns before and beside it."""
    meta = [{"n": i, "content": t, "tags": ["x"]} if i != 5 else None for i, t in enumerate(TEXTS)]
    table = pa.table({"first": [[i] for i in range(30)], "meta": meta, "a": [{"b": m} for m in meta], "meta.x": TEXTS})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=11)
    texts, rejections = read_file(tmp_path / "x.parquet", columns=(name,), needed=(name,))
    if name == "meta.x":
        assert (texts, rejections) == (TEXTS, [])
    else:
        assert texts == [t for i, t in enumerate(TEXTS) if i != 5]
        assert [(r.line, r.kind) for r in rejections] == [(6, f"{name} is not a string")]


@pytest.mark.parametrize("where", ["meta.content", "a.b.content", "x.y"])
def test_nested_names_in_json_lines(where: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"meta": {"content": t}, "a": {"b": {"content": t}}, "x.y": t, "x": 3} for t in TEXTS])
    assert read_file(path, columns=(where,), needed=(where,)) == (TEXTS, [])


def duplicated(tmp_path: Path, name: str) -> Path:
    table = pa.table([pa.array(TEXTS), pa.array(["mit"] * 30), pa.array(["other"] * 30)], names=["content", "license", name])
    pq.write_table(table, tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_a_column_twice(tmp_path: Path) -> None:
    """Of the text nobody can say which is meant; of another column the first is taken."""
    texts, rejections = read_file(duplicated(tmp_path, "content"), columns=("content", "license"))
    assert texts == [] and [str(r.reason) for r in rejections] == ["more than one column content (rename all but one)"]
    source = Source(kind="file", name=str(duplicated(tmp_path, "license")), size=0)
    found = [row.value for b in read_blocks([source], ReadOptions(columns=("content", "license"))) for row in b.rows]
    assert [row["license"] for row in found] == ["mit"] * 30 and [row["content"].decode() for row in found] == TEXTS


def test_odd_tables(tmp_path: Path) -> None:
    tables = {
        "no rows": (pa.table({"content": pa.array([], pa.string())}), 0, []),
        "all null": (pa.table({"content": pa.nulls(3)}), 0, ["content is not a string"] * 3),
        "numbers": (pa.table({"content": [1, 2]}), 0, ["content is not a string"] * 2),
        "lists": (pa.table({"content": [["x"]]}), 0, ["content is not a string"]),
        "another column": (pa.table({"text": ["x"]}), 0, ["no column content"]),
        "an extension type": (pa.table({"content": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["a b"]))}), 1, []),
    }
    for name, (table, count, kinds) in tables.items():
        pq.write_table(table, tmp_path / "x.parquet")
        texts, rejections = read_file(tmp_path / "x.parquet")
        assert (len(texts), [r.kind for r in rejections]) == (count, kinds), name


@pytest.mark.parametrize("dictionary", [True, False])
def test_no_row_is_larger_than_a_line_may_be(dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)
    pq.write_table(
        pa.table({"content": ["a", "b" * 2000, "c", "b" * 2000, "d", "e"]}), tmp_path / "x.parquet", use_dictionary=dictionary
    )
    texts, rejections = read_file(tmp_path / "x.parquet")
    assert texts == ["a", "c", "d", "e"] and [(r.line, r.kind) for r in rejections] == [
        (2, blocks.too_long()),
        (4, blocks.too_long()),
    ]


@pytest.mark.parametrize("rows_at", [0, 1, 13, 29])
def test_large_dictionaries_are_taken_up_anywhere(rows_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.sources.blocks import Position

    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 400)  # a text is shorter, the dictionary is not, and stays one
    pq.write_table(pa.table({"content": [TEXTS[i % 5] for i in range(30)]}), tmp_path / "x.parquet", row_group_size=7)
    source = Source(kind="file", name=str(tmp_path / "x.parquet"), size=0)
    found = [row for b in read_blocks([source], ReadOptions(), Position(offset=rows_at)) for row in b.rows]
    assert [row.line for row in found] == list(range(rows_at + 1, 31))
    assert [row.value["content"].decode() for row in found] == [TEXTS[i % 5] for i in range(rows_at, 30)]


BOMB = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from data_helpers import read_file
texts, rejections = read_file(Path(sys.argv[1]))
# Not ru_maxrss, in which a started process inherits its parent's.
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10
print(len(texts), len(rejections), sorted({r.kind for r in rejections}), peak)
"""


@pytest.mark.parametrize(
    "kind", ["dictionary", *(pytest.param(k, marks=pytest.mark.slow) for k in ("string", "prefixes", "lists"))]
)
def test_a_value_of_150_mb_in_2000_rows_is_refused_in_bounded_memory(kind: str, tmp_path: Path) -> None:
    """14 kB on disk. Decoded row by row it would be 300 GB; 64 rows at a time were 9.6 GB."""
    value = pa.array(["x" * (150 << 20)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), value)
    layout: dict[str, Any] = {"compression": "zstd", "store_schema": kind == "dictionary"}
    if kind == "prefixes":  # each value is the whole one before it and a letter more
        column = pa.array(["x" * (150 << 20) + "y" * i for i in range(5)])
        layout |= {"column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False}
    if kind == "lists":
        column = pa.ListArray.from_arrays(pa.array([0, 1999, 2000], pa.int32()), column)
    pq.write_table(pa.table({"content": column}), tmp_path / "x.parquet", **layout)
    assert (tmp_path / "x.parquet").stat().st_size < 50_000
    environ = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/data'}"}
    line = [sys.executable, "-c", BOMB, str(tmp_path / "x.parquet")]
    done = subprocess.run(line, capture_output=True, text=True, env=environ, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if kind == "lists":
        assert done.stdout.startswith("0 1 ['Parquet file of rows that are too long'] "), done.stdout
    else:
        assert done.stdout.startswith(f"0 {len(column)} ['{blocks.too_long()}'] "), done.stdout
    assert int(done.stdout.split()[-1]) < 2000


def test_rows_that_are_long_on_average_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)
    pq.write_table(pa.table({"content": [f"{i}" * 2000 for i in range(10)]}), tmp_path / "x.parquet", use_dictionary=False)
    texts, rejections = read_file(tmp_path / "x.parquet")
    assert texts == [] and [r.kind for r in rejections] == ["Parquet file of rows that are too long"]


def test_rows_of_many_values_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their dictionary makes of them: in the file they are short."""
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 10_000)
    pq.write_table(pa.table({"content": [["x" * 500] * 100] * 20}), tmp_path / "x.parquet")
    assert [r.kind for r in read_file(tmp_path / "x.parquet")[1]] == ["Parquet file of rows that are too long"]


def test_long_rows_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2000)
    table = pa.table({"content": [f"{i:03}" * 200 for i in range(30)]})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, compression="none")
    assert [batch.num_rows for _, batch in parquet._batches(str(tmp_path / "x.parquet"), ReadOptions())] == [3] * 10


def test_a_dictionary_counts_as_what_it_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)
    pq.write_table(pa.table({"content": ["x" * 2000] * 30}), tmp_path / "x.parquet", compression="zstd")
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    assert parquet._plan(str(tmp_path / "x.parquet"), group, [0]).kept_dictionaries == ["content"]


def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would leave the file out for good."""

    def fail(*_: object) -> Iterator[None]:
        raise OSError(errno.EIO, "gone")
        yield

    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "_batches", fail)
    assert [r.kind for r in read_file(tmp_path / "x.parquet")[1]] == ["cannot be read"]


def test_running_out_of_memory_is_a_reason_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 123 failed")

    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "_values", fail)
    rejections = read_file(tmp_path / "x.parquet")[1]
    assert [r.reason for r in rejections] == ["Parquet file that needs more memory than there is (malloc of size 123 failed)"]


def test_the_command_on_a_table_of_a_struct(tmp_path: Path, preprocess: Callable, tokenizer_file: Path) -> None:
    pq.write_table(pa.table({"file": [{"text": t} for t in TEXTS]}), tmp_path / "x.parquet")
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0, "--text_field", "file.text"]
    code, _, err = preprocess("--input", tmp_path / "x.parquet", *flags)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["documents"] == 30
