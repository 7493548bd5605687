"""The task files for lm-eval: what they say, and the verdict that they call for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.evaluation import lm_eval
from launch.evaluation.lm_eval.judged import process_results
from launch.evaluation.problems import FUNCTION_STOPS, rows

FOLDER = Path(lm_eval.__file__).parent


class Loader(yaml.SafeLoader):
    """lm-eval's `!function module.name` as its text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_tasks_are_local_and_stop_as_ours() -> None:
    tasks = {path.stem: yaml.load(path.read_text(), Loader) for path in FOLDER.glob("*.yaml")}
    assert set(tasks) == {"code_bits_per_byte", "humaneval_sandboxed"}
    assert all(task["task"] == name and task["dataset_path"] == "json" for name, task in tasks.items())
    judged = tasks["humaneval_sandboxed"]
    assert tuple(judged["generation_kwargs"]["until"]) == FUNCTION_STOPS and judged["unsafe_code"] is True
    assert judged["process_results"] == "judged.process_results"


@pytest.mark.parametrize(("completion", "passed"), [(None, 1.0), ("    pass\n", 0.0), ("    import os; os._exit(0)\n", 0.0)])
def test_verdicts_are_the_sandbox_s(completion: str | None, passed: float, problem_files: dict[str, Path]) -> None:
    for _, document in rows(problem_files["humaneval"]):
        assert process_results(document, [completion or document["canonical_solution"]]) == {"pass@1": passed}
