"""Parquet and hub data sets give the same documents as JSON Lines of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import contents, read_documents, write_rows

from data.sources import blocks as block_sizes
from data.sources.blocks import ReadOptions
from data.sources.discover import Source
from data.sources.read import read_blocks


def documents(preprocess: Any, tokenizer_file: Path, output: Path, *inputs: object, flags: tuple = ()) -> list[list[int]]:
    usual = ["--tokenizer", tokenizer_file, "--output", output, "--validation_fraction", 0]
    code, _, err = preprocess("--input", *inputs, *usual, *flags)
    assert code == 0, err
    return read_documents(output)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_parquet_is_its_rows(kind: str, tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict]) -> None:
    columns = {key: [r[key] for r in rows] for key in rows[0]}
    columns["content"] = pa.array([t.encode() for t in columns["content"]], pa.binary()).cast(getattr(pa, kind)())
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=7)
    path = write_rows(tmp_path / "x.jsonl", rows)
    found = documents(preprocess, tokenizer_file, tmp_path / "a", tmp_path / "x.parquet", flags=("--licenses", "mit"))
    assert found == documents(preprocess, tokenizer_file, tmp_path / "b", path, flags=("--licenses", "mit")) and len(found) == 40


def test_parquet_with_bad_rows(tmp_path: Path, preprocess: Any, tokenizer_file: Path) -> None:
    text = pa.array([b"a = 1\n", b"\xff\xfe", None, b"", b"b = 2\n"], pa.binary())
    broken = pa.StringArray.from_buffers(5, *text.buffers()[1:], text.buffers()[0])  # invalid UTF-8 under the type string
    pq.write_table(pa.table({"content": broken}), tmp_path / "x.parquet")
    assert len(documents(preprocess, tokenizer_file, tmp_path / "out", tmp_path / "x.parquet")) == 2
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejected] == [(2, "not UTF-8"), (3, "content is not a string"), (4, "empty text")]


def test_damaged_and_wrong_parquet_is_named(tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict]) -> None:
    pq.write_table(pa.table({"content": [r["content"] for r in rows]}), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    (tmp_path / "hole.parquet").write_bytes(data[:1000] + bytes(20_000) + data[21_000:])
    (tmp_path / "text.parquet").write_text("no parquet")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "other.parquet")
    assert len(documents(preprocess, tokenizer_file, tmp_path / "out", f"{tmp_path}/*.parquet")) == len(rows)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {Path(r["file"]).name: r["reason"] for r in rejected}
    assert set(reasons) == {"cut.parquet", "hole.parquet", "text.parquet", "other.parquet"}
    assert reasons["other.parquet"].startswith("no column content") and reasons["text.parquet"] == "not a Parquet file"


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_rows_can_be_taken_up_at_any_block(kind: str, tmp_path: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(block_sizes, "BLOCK_BYTES", 20_000)
    pq.write_table(pa.table({"content": [r["content"] for r in rows]}), tmp_path / "x.parquet", row_group_size=7)
    source = Source(kind=kind, name=str(tmp_path if kind == "hub" else tmp_path / "x.parquet"), size=0)
    blocks = list(read_blocks([source], ReadOptions()))
    numbers = [line for b in blocks for _, line, _ in b.rows]
    assert numbers == list(range(1, len(rows) + 1)) and len(blocks) > 5
    for i in range(0, len(blocks) - 1, 3):
        rest = [row for b in read_blocks([source], ReadOptions(), blocks[i].after) for row in b.rows]
        assert rest == [row for b in blocks[i + 1 :] for row in b.rows]


WORDS = "x" * 1000


@pytest.mark.parametrize(
    ("value", "kind", "most"),
    [
        (None, None, 4096),
        (7, None, 4096),
        ({"a": 7}, None, 4096),
        (WORDS, None, 1400),
        ([WORDS], None, 1400),
        ({"a": [{"b": WORDS.encode()}]}, None, 1400),
        ([("a", WORDS)], pa.map_(pa.string(), pa.string()), 1400),
    ],
)
def test_whatever_a_table_holds_a_block_is_small(value: object, kind: pa.DataType | None, most: int, tmp_path: Path) -> None:
    """4,000,000 nulls, a file of 12 kB, were one block, which took 3.4 GB."""
    pq.write_table(pa.table({"content": pa.array([value] * 10_000, kind)}), tmp_path / "x.parquet")
    source = Source(kind="file", name=str(tmp_path / "x.parquet"), size=0)
    counts = [len(block.rows) for block in read_blocks([source], ReadOptions())]
    assert sum(counts) == 10_000 and most / 2 < max(counts) <= most


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet"])
def test_hub_names_through_datasets_streaming(
    suffix: str, tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict]
) -> None:
    """A folder stands for the hub's repository: the same `load_dataset(..., streaming=True)`, the same builders."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    else:
        write_rows(folder / f"train{suffix}", rows)
    found = documents(preprocess, tokenizer_file, tmp_path / "a", f"hub:{folder}", flags=("--split", "train", "--licenses", "mit"))
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert found == documents(preprocess, tokenizer_file, tmp_path / "b", path, flags=("--licenses", "mit")) and len(found) == 40


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_nested_fields_are_found_in_every_kind_of_table(
    kind: str, tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict]
) -> None:
    """In JSON Lines a nested license was not seen, and every document went as one of unknown license."""
    nested = [{"meta": {"text": r["content"], "info": {"license": r["license"]}}} for r in rows]
    folder = tmp_path / "dataset"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(nested), folder / "train.parquet")
    else:
        write_rows(folder / "train.jsonl", nested)
    source = f"hub:{folder}" if kind == "hub" else next(folder.iterdir())
    flags = ("--text_field", "meta.text", "--licenses", "mit", "--license_field", "meta.info.license")
    found = documents(preprocess, tokenizer_file, tmp_path / "a", source, flags=flags)
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert found == documents(preprocess, tokenizer_file, tmp_path / "b", path, flags=("--licenses", "mit")) and len(found) == 40


def test_a_hub_stream_that_breaks_stops_the_job_and_is_taken_up(
    tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.pipeline import job
    from data.sources import tables

    monkeypatch.setattr(block_sizes, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(job, "STATE_INTERVAL_S", 0.0)
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows)
    real, breaks = tables._hub_rows, [30]

    def unsteady(*args: Any) -> Any:
        for number, row in enumerate(real(*args)):
            if number == breaks[0]:
                raise ConnectionError("the hub is gone")
            yield row

    monkeypatch.setattr(tables, "_hub_rows", unsteady)
    flags = ["--input", f"hub:{folder}", "--tokenizer", tokenizer_file, "--validation_fraction", 0]
    code, _, err = preprocess(*flags, "--output", tmp_path / "out")
    assert code == 2 and "stopped after" in err and "the hub is gone" in err and "Traceback" not in err
    assert "position" in json.loads((tmp_path / "out" / "state.json").read_text())
    breaks[0] = 10**9
    for output in ("out", "whole"):
        assert preprocess(*flags, "--output", tmp_path / output)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_column_that_a_data_set_lacks_is_no_interruption(
    tmp_path: Path, preprocess: Any, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Run the same command again" would not have helped."""
    import datasets

    rows = datasets.Dataset.from_dict({"code": ["a = 1"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    code, _, err = preprocess("--input", "hub:a/b", "--tokenizer", tokenizer_file, "--output", tmp_path / "out")
    assert code == 2 and "a/b has no column content, only code; name the one of the text with --text_field" in err
    assert "again" not in err and err.count("\n") == 1


def test_a_hub_name_out_of_reach_is_one_sentence(
    tmp_path: Path, preprocess: Any, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    code, _, err = preprocess("--input", "hub:a/b", "--tokenizer", tokenizer_file, "--output", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "a/b" in err and "Couldn't reach" in err
