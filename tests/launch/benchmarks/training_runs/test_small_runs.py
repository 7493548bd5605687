"""The folders of small runs: what lies there is used for what it is and for nothing else, killed or done."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from data.cli import UserError
from data.lock import FolderLock
from launch.benchmarks import ladder, learning
from launch.benchmarks.training_runs import small_runs
from launch.benchmarks.training_runs.same_run import check_same, claimed, evaluated
from launch.benchmarks.training_runs.shards import Shards
from launch.benchmarks.training_runs.small_runs import SmallRun
from launch.benchmarks.training_runs.variants import merged
from launch.reporting.read import read_run
from model import MoEGPTConfig

STEPS = 40
FLAGS = ("--variants", "quantile", "--seeds", 5, "--max_steps", STEPS, "--evaluations", 4)


def flags(small_shards: Path, small_model: Path, folder: Path, *more: object) -> list[str]:
    given = ["--data", small_shards, "--model", small_model, "--deepspeed_config", "ds_configs/cpu_ep1_zero2.json"]
    given += ["--sequence_length", 64, "--eval_batches", 1, "--folder", folder, *FLAGS, *more]
    return [str(flag) for flag in given]


def start(given: list[str], output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/benchmark.py", "learning", *given, "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    learning.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture(scope="module")
def done(small_shards: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The real command's folder, never interrupted, and what it wrote."""
    folder = tmp_path_factory.mktemp("learning")
    process = start(flags(small_shards, small_model, folder / "runs"), folder / "out.json")
    said = process.communicate()[1]
    assert process.returncode == 0, said[-2000:]
    return folder / "runs", json.loads((folder / "out.json").read_text())


@pytest.fixture
def planned(
    done: tuple[Path, dict[str, Any]], small_shards: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[SmallRun]]:
    """The runs of the fixture's command, with other flags after its own."""
    monkeypatch.chdir(ROOT)

    def plan(*more: object) -> list[SmallRun]:
        runs = learning.plan_runs(parse(flags(small_shards, small_model, done[0], *more)))
        return [one for seeds in runs.values() for one in seeds]

    return plan


def refuse(*_: object, **__: object) -> int:
    raise AssertionError("it trained again")


def test_the_real_command_and_going_on(
    done: tuple[Path, dict[str, Any]], small_shards: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again it trains nothing, in one slice or two, and at fewer token counts."""
    folder, result = done
    row = result["variants"]["quantile"]
    assert row["tokens"] == [part * 10 * 16 * 64 for part in range(5)] and row["bits"][4] < row["bits"][0]
    assert result["runs"]["quantile"][0]["max_vio"]["run"] > 0
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(small_runs, "run_leashed", refuse)
    again = learning.run(parse(flags(small_shards, small_model, folder, "--slices", 2)))
    assert again["variants"]["quantile"] == row
    fewer = learning.run(parse(flags(small_shards, small_model, folder, "--evaluations", 2)))
    assert fewer["variants"]["quantile"]["bits"] == row["bits"][::2]


def test_a_moved_folder_another_port_and_more_runs_are_no_other_run(
    planned: Callable[..., list[SmallRun]], small_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(small_shards)
    more = planned("--seeds", 5, 6, "--variants", "quantile", "none")
    for one in (*planned("--data", tmp_path / "moved"), *more):
        check_same(one, Shards())
    assert [one.is_done(STEPS) for one in more] == [True, False, False, False]
    assert more[0].arguments(STEPS) == planned()[0].arguments(STEPS)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--max_steps", 20), f"max_steps: {STEPS} -> 20"),
        (("--evaluations", 8), "eval_interval: 10 -> 5"),
        (("--eval_batches", 2), "eval_batches: 1 -> 2"),
        (("--sequence_length", 32), "sequence_length: 64 -> 32"),
        (("--ranks", 2), "ranks: 1 -> 2"),
        (("--data", "OTHER"), "data.content: "),
        (("--model", "OTHER"), "model.n_shared_experts: 1 -> 2"),
        (("--deepspeed_config", "OTHER"), r"deepspeed.optimizer.params.lr: 0.002 -> 0.004"),
        (("--variants", "--variants_file", "OTHER"), "document_mask: false -> true"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_was_trained_otherwise_is_refused(
    planned: Callable[..., list[SmallRun]], small_shards: Path, small_model: Path, tmp_path: Path, more: tuple[Any, ...], says: str
) -> None:
    """By the folder and the setting, before anything trains."""
    settings = json.loads((ROOT / "ds_configs/cpu_ep1_zero2.json").read_text())
    other = {
        "--data": [f"{small_shards}:1", f"{small_shards}:2"],
        "--model": [tmp_path / "model.json"],
        "--deepspeed_config": [tmp_path / "ds.json"],
        "--variants": ["--variants_file", tmp_path / "variants.json"],
    }.get(more[0], more[1:])
    (tmp_path / "model.json").write_text(json.dumps({**json.loads(small_model.read_text()), "n_shared_experts": 2}))
    (tmp_path / "ds.json").write_text(json.dumps(merged(settings, {"optimizer": {"params": {"lr": 0.004}}})))
    masked = {"name": "quantile", "model": {"router_balance": "quantile"}, "flags": ["--document_mask"]}
    (tmp_path / "variants.json").write_text(json.dumps([masked]))
    (run,) = planned(more[0], *other)
    with pytest.raises(UserError) as refused, claimed([run], Shards()):
        refuse()
    assert str(refused.value).startswith(f"{run.folder} holds a training of other settings")
    assert says in str(refused.value) and "name another --folder, or remove that one" in str(refused.value)


def test_a_folder_that_cannot_be_read_is_no_result(planned: Callable[..., list[SmallRun]], tmp_path: Path) -> None:
    (run,) = planned()
    for missing, kept in (("run/config.json", "run/metrics.jsonl"), ("deepspeed.json", "run/config.json")):
        copy = replace(run, folder=tmp_path / missing.replace("/", "_"))
        (copy.folder / "run").mkdir(parents=True)
        check_same(copy, Shards())  # nothing was trained yet
        (copy.folder / kept).write_bytes((run.folder / kept).read_bytes())
        with pytest.raises(UserError, match=f"what was trained there cannot be read .*{missing}"):
            check_same(copy, Shards())


def test_a_run_from_before_an_argument_and_a_field_had_their_defaults(
    planned: Callable[..., list[SmallRun]], tmp_path: Path
) -> None:
    (run,) = planned()
    old = replace(run, folder=tmp_path)
    (tmp_path / "run").mkdir()
    config = json.loads((run.folder / "run" / "config.json").read_text())
    del config["arguments"]["compile"], config["arguments"]["spike_window"], config["model"]["router_aux_loss_coef"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "deepspeed.json").write_text(json.dumps(run.deepspeed))
    check_same(old, Shards())
    other = MoEGPTConfig(**{**run.config.to_dict(), "router_aux_loss_coef": 0.01})
    with pytest.raises(UserError, match=r"router_aux_loss_coef: 0\.0 -> 0\.01"):
        check_same(replace(old, config=other), Shards())


@pytest.mark.parametrize(("steps", "interval", "asked", "there"), [
    (400, 100, 4, True), (400, 100, 2, True), (400, 100, 1, True), (400, 100, 8, False), (400, 100, 3, False),
    (401, 101, 4, True), (401, 100, 4, True), (150, 75, 4, False), (4, 2, 4, False), (4, 1, 4, True),
    (7, 2, 4, True), (7, 0, 1, True),
])  # fmt: skip
def test_which_evaluations_are_there(
    planned: Callable[..., list[SmallRun]], steps: int, interval: int, asked: int, there: bool
) -> None:
    (run,) = planned()
    assert evaluated(replace(run, steps=steps, evaluations=asked), interval) == there
    own = replace(run, steps=steps, evaluations=asked)
    assert evaluated(own, own.interval)


def test_two_commands_do_not_train_one_run(
    done: tuple[Path, dict[str, Any]], small_shards: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another has finished is read by both."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(small_runs, "run_leashed", refuse)
    mine = flags(small_shards, small_model, tmp_path)
    held = FolderLock(tmp_path / "quantile" / "seed_5")
    held.take()
    with pytest.raises(
        UserError, match=r"seed_5 is in use by another benchmark \(process \d+ on .*\); end it or name another --fol"
    ):
        learning.run(parse(mine))
    held.release()
    with pytest.raises(AssertionError):
        learning.run(parse(mine))
    assert held.take()  # let go of, however it ended
    held.release()
    theirs = FolderLock(done[0] / "quantile" / "seed_5")
    theirs.take()
    learning.run(parse(flags(small_shards, small_model, done[0])))
    theirs.release()
    with pytest.raises(UserError, match="--seeds 5 5: give each seed once"):
        learning.run(parse([*mine, "--seeds", "5", "5"]))


def test_another_validation_split_alone_is_another_comparison(
    planned: Callable[..., list[SmallRun]], small_shards: Path, tmp_path: Path
) -> None:
    (run,) = planned()
    for file in small_shards.rglob("*"):
        if file.is_file():
            copy = tmp_path / "shards" / file.relative_to(small_shards)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    moved = replace(run, data=(str(tmp_path / "shards"),))
    check_same(moved, Shards())
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    manifest["splits"]["validation"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"other settings .*: validation split: "):
        check_same(moved, Shards())
    config = json.loads((run.folder / "run/config.json").read_text())
    del config["validation"]  # as older runs have it
    old = replace(moved, folder=tmp_path / "old")
    (old.folder / "run").mkdir(parents=True)
    (old.folder / "run/config.json").write_text(json.dumps(config))
    (old.folder / "deepspeed.json").write_text(json.dumps(run.deepspeed))
    check_same(old, Shards())


def test_killed_before_its_last_evaluation_it_is_not_done(planned: Callable[..., list[SmallRun]], tmp_path: Path) -> None:
    (run,) = planned()
    rows = (run.folder / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    killed = replace(run, folder=tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(
        "".join(row for row in rows if not ("val_loss" in json.loads(row) and json.loads(row)["step"] == STEPS))
    )
    assert killed.is_done(STEPS // 2) and not killed.is_done(STEPS) and run.is_done(STEPS)


def test_only_what_this_training_said_are_its_last_words(planned: Callable[..., list[SmallRun]], tmp_path: Path) -> None:
    (run,) = planned()
    one = replace(run, folder=tmp_path)
    one.log.write_text("error: of yesterday\n")
    before = one.log.stat().st_size
    assert one.last_words(before) == "it said nothing"
    one.log.write_text("error: of yesterday\nerror: of today\nrank 0 exits\n")
    assert one.last_words(before) == "error: of today"


def test_one_that_stops_by_itself_is_no_result(
    small_shards: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: list[str], log: Path) -> int:
        log.write_text("step 3 saved\nstopped by SIGTERM\n")
        return 0

    monkeypatch.setattr(small_runs, "run_leashed", stopped)
    monkeypatch.chdir(ROOT)
    (run,) = learning.plan_runs(parse(flags(small_shards, small_model, tmp_path)))["quantile"]
    with pytest.raises(UserError, match="stopped before step 40: stopped by SIGTERM; the same command goes on"):
        run.train(STEPS)


def test_a_ladder_looks_at_all_its_folders_first(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuning's too, which come last."""
    monkeypatch.setattr(small_runs, "run_leashed", refuse)
    parser = argparse.ArgumentParser()
    ladder.add_arguments(parser)
    given = ["--data", small_shards, "--hidden", 64, 96, 128, 160, "--tokens", 8192, 16384, 24576]
    given += ["--learning_rates", 0.002, 0.004, "--deepspeed_config", ROOT / "ds_configs/cpu_ep1_zero2.json", "--folder", tmp_path]
    last = tmp_path / "tuning" / "tokens_24576_batch_16_lr_0.004" / "run"
    last.mkdir(parents=True)
    (last / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"batch_16_lr_0\.004: what was trained there cannot be read"):
        ladder.run(parser.parse_args([str(flag) for flag in given]))


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(
    done: tuple[Path, dict[str, Any]], small_shards: Path, small_model: Path, tmp_path: Path
) -> None:
    """By SIGKILL, after the second checkpoint: no training is left over, and the same command ends where none was killed."""
    given = flags(small_shards, small_model, tmp_path / "runs")
    run = tmp_path / "runs" / "quantile" / "seed_5" / "run"
    first = start(given, tmp_path / "out.json")
    while not any(run.glob("checkpoints/step_*/state.json")):
        assert first.poll() is None, first.stderr and first.stderr.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(given, tmp_path / "out.json")  # at once
    said = second.communicate()[1]
    assert second.returncode == 0, said[-2000:]
    assert any(mark.kind == "restart" for mark in read_run(run).marks), "it was done before it was killed"
    found = json.loads((tmp_path / "out.json").read_text())["variants"]["quantile"]
    for name in ("tokens", "bits", "grad_norm_median", "max_vio_run"):
        assert found[name] == done[1]["variants"]["quantile"][name]
