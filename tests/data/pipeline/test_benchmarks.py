"""Benchmarks are read, and what shares their tasks is removed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import kept_and_removed, overlaps, shared_data, write_rows

from data.pipeline.benchmarks import load_contamination, read_tasks


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "mxeval-mbpp_release_v1.jsonl.gz"])
def test_every_task_of_a_benchmark_is_found_and_the_standard_library_is_not(name: str, texts: list[str]) -> None:
    path = shared_data("eval") / name
    rule = load_contamination([str(path)])
    assert rule is not None
    with gzip.open(path) as file:
        rows = [json.loads(line) for line in file][::3]
    solved = [r["prompt"] + (r["canonical_solution"] or "") for r in rows]
    reached = [s for s in solved if overlaps(s, [s])]
    assert len(reached) > 0.95 * len(rows)
    embedded = [f"import os\n\n{s}\n\nprint(1)\n" for s in reached]
    assert all(rule(t, {}) == f"overlaps {name}" for t in embedded)
    assert sum(rule(t, {}) is not None for t in texts) <= 2


def test_decontamination_through_the_command(tmp_path: Path, preprocess: Any, tokenizer_file: Path, texts: list[str]) -> None:
    task = "def add_two_numbers(first, second):\n    # return the sum of first and second\n    return first + second\n"
    bench = write_rows(tmp_path / "bench.jsonl.gz", [{"task_id": "T/0", "prompt": task}])
    rows = [{"content": t} for t in (texts[0], "import re\n\n" + task, texts[1])]
    kept, removed = kept_and_removed(tmp_path, preprocess, tokenizer_file, rows, "--decontaminate", bench)
    assert kept == texts[:2] and removed == {"overlaps bench.jsonl.gz": 1}


def test_a_benchmark_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has one of the fields"):
        read_tasks(str(write_rows(tmp_path / "x.jsonl", [{"note": "x"}])))


def test_what_only_tests_show_of_a_task_counts_too(tmp_path: Path) -> None:
    """MBPP's tests are a list, each of them shorter than ten words; MultiPL-E's are one text under `tests`."""
    asserts = [
        "assert remove_occ('hello', 'l') == 'heo'",
        "assert remove_occ('abcda', 'a') == 'bcd'",
        "assert remove_occ('php', 'p') == 'h'",
    ]
    rule = load_contamination([str(write_rows(tmp_path / "mbpp.jsonl", [{"text": "Remove.", "test_list": asserts}]))])
    assert rule is not None and rule("x = 1\n" + "\n".join(asserts), {}) == "overlaps mbpp.jsonl"
    assert rule(asserts[0], {}) is None
    rule = load_contamination([str(write_rows(tmp_path / "humaneval-rs.jsonl", [{"tests": "\n".join(asserts)}]))])
    assert rule is not None and rule("\n".join(asserts), {}) == "overlaps humaneval-rs.jsonl"


def test_every_field_that_shows_a_task_is_read(tmp_path: Path) -> None:
    names = "prompt canonical_solution suffix test text code content test_list challenge_test_list test_setup_code tests assertion"
    names += " complete_prompt instruct_prompt reference_code code_context question_content starter_code question solutions"
    for name in f"{names} description".split():
        assert read_tasks(str(write_rows(tmp_path / "x.jsonl", [{"task_id": "T/0", name: "x"}]))) == ["x"], name


def test_a_list_that_stands_as_text_counts_by_its_elements(tmp_path: Path) -> None:
    """As APPS keeps `solutions`."""
    solution = "def largest(numbers):\n    best = None\n    for value in numbers:\n        best = value\n    return best\n"
    rule = load_contamination([str(write_rows(tmp_path / "apps.jsonl", [{"solutions": json.dumps([solution, "[x"])}]))])
    assert rule is not None and rule("import os\n" + solution, {}) == "overlaps apps.jsonl"
    assert read_tasks(str(write_rows(tmp_path / "x.jsonl", [{"code": "[x for x in y]"}]))) == ["[x for x in y]"]
    for other in ('[["two sorted arrays"]]', '[{"solution": "x"}]', "[" * 100_000):  # no list of texts: as it stands
        assert read_tasks(str(write_rows(tmp_path / "x.jsonl", [{"solutions": other}]))) == [other]


def test_a_benchmark_that_nothing_overlaps_is_said(tmp_path: Path, preprocess: Any, tokenizer_file: Path, corpus: Path) -> None:
    words = " ".join(f"word{i}" for i in range(30))
    bench = write_rows(tmp_path / "bench.jsonl", [{"prompt": words}])
    flags = ["--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--decontaminate", bench]
    code, out, err = preprocess(*flags)
    assert code == 0 and "removed 0: overlaps bench.jsonl" in out, err


def test_benchmarks_of_one_name_in_two_folders_both_count(tmp_path: Path) -> None:
    tasks = [" ".join(f"{letter}{i}" for i in range(12)) for letter in "ab"]
    paths = []
    for number, task in enumerate(tasks):
        (tmp_path / str(number)).mkdir()
        paths.append(str(write_rows(tmp_path / str(number) / "bench.jsonl", [{"prompt": task}])))
    rule = load_contamination(paths)
    assert rule is not None and [rule(task, {}) for task in tasks] == ["overlaps bench.jsonl"] * 2


def test_a_benchmark_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"task_id": ["a"], "prompt": ["some text"], "n": [1]}), tmp_path / "x.parquet")
    assert read_tasks(str(tmp_path / "x.parquet")) == ["some text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<html>", "HTML"), (b"{}\n{bad\n", "line 2: broken JSON"), (b"", "empty file"), (None, "no such file")],
)
def test_a_broken_benchmark_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--decontaminate .*x.jsonl.*{message}"):
        read_tasks(str(tmp_path / "x.jsonl"))
