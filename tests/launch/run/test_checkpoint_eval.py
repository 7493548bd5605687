"""`--eval_tasks NAME=PROBLEMS`: what a checkpoint writes is run beside the training, and nothing of it shows in what is trained."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import metrics

from data.cli import UserError
from data.lock import try_lock
from launch.evaluation import of_checkpoint
from launch.evaluation.of_checkpoint import HELD, clear_dead
from launch.evaluation.problems import ProblemFile
from launch.run.arguments import parse_arguments
from launch.run.checkpoint_eval import CheckpointEvaluator
from launch.run.metrics import Monitor
from launch.run.resolve import open_tasks

SHORT = ("--max_steps", 4, "--sequence_length", 64, "--log_interval", 1, "--eval_interval", 2, "--eval_batches", 2)
TRAINED = ("step", "samples", "loss", "grad_norm", "lr", "load_max_over_mean", "val_loss", "val_bits_per_byte")
EASY = {
    "task_id": "t/0",
    "entry_point": "f",
    "prompt": "def f():\n    return 7\n#",
    "canonical_solution": "",
    "test": "def check(f):\n    assert f() == 7\n",
}
HARD = {**EASY, "task_id": "t/1", "test": "def check(f):\n    assert f() == 8\n"}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (EASY, HARD)), encoding="utf-8")
    return path


def wait_for(path: Path, seconds: float = 120) -> dict:
    until = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < until, [p.read_text() for p in path.parent.glob("*.log")]
        time.sleep(0.2)
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_is_bit_equal_with_and_without(
    ranks: int, forked_train, small_shards: Path, small_model: Path, problems: Path, tmp_path: Path
) -> None:
    rows = {}
    for name, more in (("off", ()), ("on", ("--eval_tasks", f"code={problems}", "--allow_code_execution"))):
        flags = ("--data", small_shards, "--model", small_model, "--output", tmp_path / name, "--wandb", "disabled", *SHORT)
        done = forked_train(ranks, *flags, *more, "--save_interval", 2)
        assert done.returncode == 0, done.stderr[-3000:]
        rows[name] = [
            {key: row.get(key) for key in TRAINED} for row in metrics(tmp_path / name) if "loss" in row or "val_loss" in row
        ]
    assert rows["off"] == rows["on"]
    found = wait_for(tmp_path / "on" / "evaluations" / "step_2.code.json")
    assert found["problems"] == 2 and 0 <= found["pass@1"] <= 1 and found["isolation"]["level"]


def test_a_result_becomes_a_row(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a judge that only writes the file; one that fails is said, and the next checkpoint is judged again."""
    said: list[str] = []
    monitor = Monitor(tmp_path, enabled=True, last_step=9)
    monkeypatch.setattr(monitor, "say", said.append)
    monkeypatch.setenv("RANK", "0")
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, os, sys\n"
        "assert 'RANK' not in os.environ and os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
        "checkpoint, folder, count, task = sys.argv[4:]\n"
        f"assert count == '5' and task == 'code=humaneval={problems}', task\n"
        "name = os.path.basename(checkpoint)\n"
        "if name == 'step_4': sys.exit('no such checkpoint')\n"
        "json.dump({'pass@1': 0.5, 'problems': 2}, open(f'{folder}/{name}.code.json', 'w'))\n"
    )
    monkeypatch.setattr("launch.run.checkpoint_eval.sys.executable", str(script(tmp_path, judge)))
    evaluator = CheckpointEvaluator(output=tmp_path, files={"code": ProblemFile.of(problems)}, problems=5, monitor=monitor)
    for step in (2, 4, 6):
        evaluator.begin(f"step_{step}")
        evaluator.begin(f"step_{step + 1}")  # while the other is judged
        assert evaluator._process is not None
        evaluator._process.wait()
        evaluator.take(step + 1)
    rows = metrics(tmp_path)
    assert [(row["step"], row["eval/code_pass@1"], row["eval/code_of_step"]) for row in rows] == [(3, 0.5, 2), (7, 0.5, 6)]
    assert [line for line in said if "could not be judged" in line and "step_4.log" in line]
    assert "no such checkpoint" in (tmp_path / "evaluations" / "step_4.log").read_text()


def test_a_judge_that_cannot_start_is_said(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on processes ended the training."""
    said: list[str] = []
    monitor = Monitor(tmp_path, enabled=True, last_step=9)
    monkeypatch.setattr(monitor, "say", said.append)
    evaluator = CheckpointEvaluator(output=tmp_path, files={"code": ProblemFile.of(problems)}, problems=5, monitor=monitor)

    def start(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("launch.run.checkpoint_eval.subprocess.Popen", start)
    evaluator.begin("step_2")
    evaluator.take(3)
    evaluator.leave()
    (tmp_path / "evaluations" / "step_4.log").mkdir()
    evaluator.begin("step_4")
    assert [line.split("(")[0] for line in said] == [f"warning: {name} cannot be judged " for name in ("step_2", "step_4")]


@pytest.mark.parametrize("result", [None, "{", "[]", '{"problems": 2}'])
def test_a_result_that_is_gone_or_no_result_is_said(
    result: str | None, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monitor = Monitor(tmp_path, enabled=True, last_step=9)
    monkeypatch.setattr(monitor, "say", said.append)
    evaluator = CheckpointEvaluator(output=tmp_path, files={"code": ProblemFile.of(problems)}, problems=5, monitor=monitor)
    evaluator.folder.mkdir()
    if result is not None:
        (evaluator.folder / "step_2.code.json").write_text(result)
    done: Any = SimpleNamespace(poll=lambda: 0, returncode=0)
    evaluator._process, evaluator._name = done, "step_2"
    evaluator.take(3)
    assert [line.split("(")[0] for line in said] == ["warning: step 3: what was found of step_2 cannot be read "]
    assert evaluator._process is None and not metrics(tmp_path)


def script(folder: Path, python: Path) -> Path:
    """An interpreter's stand-in that runs `python` whatever module it is asked for."""
    import sys

    path = folder / "interpreter"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{python}" "$@"\n')
    path.chmod(0o755)
    return path


def test_mistakes_are_one_sentence(problems: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no problem"}\n')
    flags = ["--data", "shards", "--output", str(tmp_path / "run")]
    for given, sentence in (
        ([f"code={problems}"], "add --allow_code_execution"),
        ([f"code={other}", "--allow_code_execution"], "has no problems of HumanEval"),
        ([f"code={problems}", f"code={problems}", "--allow_code_execution"], "each name once"),
    ):
        arguments = parse_arguments([*flags, "--eval_tasks", *given])
        with pytest.raises(UserError, match=sentence):
            open_tasks(arguments, None)  # type: ignore[arg-type]  # no folder among the tasks, so no shards are asked


def test_what_a_killed_judge_left_goes(tmp_path: Path) -> None:
    """Each left an export of all weights; a judge of a run that has ended since is left at its own."""
    for name in (".step_2-dead", ".step_4-alive", ".step_6-older", "step_2.json"):
        (tmp_path / name / "hf").mkdir(parents=True)
    for name in (".step_2-dead", ".step_4-alive"):
        (tmp_path / name / HELD).touch()
    with open(tmp_path / ".step_4-alive" / HELD, "rb+") as held:
        assert try_lock(held)
        clear_dead(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_4-alive", ".step_6-older", "step_2.json"]


def test_a_step_that_is_judged_again_has_nothing_of_its_earlier_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback trained it once more. Its log is this judge's own."""
    earlier, kept = ["step_2.code.json", "step_2.code.samples.jsonl"], ["step_2.log", "step_20.code.json"]
    for name in (*earlier, *kept):
        (tmp_path / name).touch()
    called: list[str] = []

    def call(command: str, *_: object) -> None:
        called.append(command)
        assert sorted(p.name for p in tmp_path.glob("step_*")) == kept

    monkeypatch.setattr(of_checkpoint, "call", call)
    monkeypatch.setattr(of_checkpoint.os, "nice", lambda _: 0)
    monkeypatch.setattr(of_checkpoint.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["", "run/checkpoints/step_2", str(tmp_path), "5", "code=humaneval=problems.jsonl"])
    assert of_checkpoint.main() == 0
    assert called == ["export.py", "evaluate.py"] and sorted(p.name for p in tmp_path.iterdir()) == kept
