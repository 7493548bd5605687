"""Scores: tests that no program can pass are named, and a judging that was interrupted goes on."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.cli import UserError
from data.terminal import drain
from launch.evaluation.job import Job, Verdict
from launch.evaluation.problems import Problem
from launch.evaluation.sandbox.levels import Level
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import Isolation, find_isolation
from launch.evaluation.scoring import check_workers, score


def problem(name: str, test: str, solution: str = "def f(): return 1\n") -> Problem:
    return Problem(task_id=name, prompt="", test=test, entry_point="f", canonical_solution=solution)


def write_samples(path: Path, samples: Iterable[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"task_id": task, "completion": text}) + "\n" for task, text in samples))
    return path


def test_tests_that_fail_their_own_solution_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They scored 0 without a word."""
    problems = {
        "solved": problem("solved", "assert f() == 1", solution="none is asked for"),
        "hard": problem("hard", "assert f() == 1"),
        "unknown": problem("unknown", "import module_that_is_not_here", solution=""),
        "broken": problem("broken", "import module_that_is_not_here"),
    }
    samples = [("solved", "def f(): return 1\n"), *((name, "def f(): return 2\n") for name in problems)]
    path = write_samples(tmp_path / "s.jsonl", samples)
    result = score(path, problems, isolation=find_isolation(), limits=Limits(), workers=2)
    why = "failed: ModuleNotFoundError: No module named 'module_that_is_not_here'"
    assert result["own_solution_fails"] == {"broken": why} and (result["samples"], result["passed"]) == (5, 1)
    drain()
    sentence = f"the tests of 1 problem do not pass with their own solution here, broken the first of them: {why}"
    assert sentence in capsys.readouterr().err


def test_an_interrupted_judging_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def execute_all(jobs: Iterable[Job], **_: Any) -> Iterator[Verdict]:
        for job in jobs:
            if len(ran) == interrupted_after:
                raise KeyboardInterrupt
            ran.append(job.program)
            yield Verdict(passed="right" in job.program, result=job.program)

    monkeypatch.setattr("launch.evaluation.scoring.execute_all", execute_all)
    texts = ["right 0", "wrong 1", "wrong 1", "right \ud800", "wrong 3", "right 4"]
    path, problems = write_samples(tmp_path / "s.jsonl", [("p", text) for text in texts]), {"p": problem("p", "")}

    def judge(seconds: int = 10, name: str = "limits") -> list[dict[str, Any]]:
        level = Level(name=name, user_namespace=False, python="python")
        isolation = Isolation(level=level, holds={}, reason="")
        score(path, problems, isolation=isolation, limits=Limits(seconds=seconds), workers=1)
        return [json.loads(line) for line in (tmp_path / "s.jsonl_results.jsonl").read_text().splitlines()]

    interrupted_after = 3
    with pytest.raises(KeyboardInterrupt):
        judge()
    kept = tmp_path / "s.jsonl.verdicts"
    assert ran == ["right 0", "wrong 1", "right \ud800"] and len(kept.read_bytes().splitlines()) == 3
    with kept.open("ab") as file:
        file.write(b'no verdict\n{"job": "begun')
    interrupted_after = 4
    with pytest.raises(KeyboardInterrupt):
        judge()
    interrupted_after = -1
    rows = judge()
    assert ran == [*dict.fromkeys(texts)] and not kept.exists()
    assert [(row["completion"], row["passed"]) for row in rows] == [(text, text.startswith("right")) for text in texts]

    ran.clear()  # what is asked for again is judged again, and so is what other limits held for
    interrupted_after = 2
    with pytest.raises(KeyboardInterrupt):
        judge()
    interrupted_after = -1
    ran.clear()
    assert judge(seconds=20) == rows and ran == [*dict.fromkeys(texts)]
    for other in ("sandbox", "judge"):
        interrupted_after = 2
        ran.clear()
        with pytest.raises(KeyboardInterrupt):
            judge()
        interrupted_after = -1
        if other == "judge":  # an update of this program
            monkeypatch.setattr("launch.evaluation.scoring.program_text", lambda: "another")
        assert judge(name="bwrap" if other == "sandbox" else "limits") == rows
        assert ran == ["right 0", "wrong 1", *dict.fromkeys(texts)]


def test_verdicts_stay_until_the_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hours of work, and a disk may be full."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    verdict = Verdict(passed=True, result="passed")
    monkeypatch.setattr("launch.evaluation.scoring.execute_all", lambda jobs, **_: (verdict for _ in jobs))
    monkeypatch.setattr("launch.evaluation.scoring.write_results", full)
    path = write_samples(tmp_path / "s.jsonl", [("p", "a"), ("p", "b")])
    isolation = Isolation(level=Level(name="limits", user_namespace=False, python="python"), holds={}, reason="")
    with pytest.raises(OSError, match="No space"):
        score(path, {"p": problem("p", "")}, isolation=isolation, limits=Limits(), workers=1)
    assert len((tmp_path / "s.jsonl.verdicts").read_bytes().splitlines()) == 2


def test_a_completion_of_white_space_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(passed=False, result="timed out")
    monkeypatch.setattr("launch.evaluation.scoring.execute_all", lambda jobs, **_: (verdict for _ in jobs))
    path = write_samples(tmp_path / "s.jsonl", [("p", text) for text in ("", " \n", "x")])
    isolation = Isolation(level=Level(name="limits", user_namespace=False, python="python"), holds={}, reason="")
    found = score(path, {"p": problem("p", "", solution="")}, isolation=isolation, limits=Limits(), workers=1)
    assert (found["samples"], found["empty"], found["timed_out"]) == (3, 2, 3)


def test_each_worker_has_users_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 257 on, two programs had one user, whose processes were counted together."""
    level, other = (Level(name="limits", user_namespace=way, python="python") for way in (False, True))
    monkeypatch.setattr("launch.evaluation.scoring.available_cores", lambda: 384)
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert [check_workers(asked, level) for asked in (0, 1, 256)] == [64, 1, 256]
    assert [check_workers(asked, other) for asked in (0, 257)] == [384, 257]
    with pytest.raises(UserError, match=r"--workers must be 256 or less where .* its own users \(limits\), not 257"):
        check_workers(257, level)
    monkeypatch.setattr("launch.evaluation.scoring.available_cores", lambda: 3)
    assert check_workers(0, level) == 3
    monkeypatch.setattr("os.getuid", lambda: 1000)
    assert check_workers(500, level) == 500
