"""A run's folder: one run at a time, and never two runs in one."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from data.cli import UserError
from data.lock import take_folder
from launch.checkpoint.identity import RunIdentity
from launch.run import folder as run_folder
from launch.run.folder import FolderWatch, changed_settings, check_not_anothers, check_same_run, write_config

HOLD = """
import sys, time
from pathlib import Path
from data.lock import take_folder
lock = take_folder(Path(sys.argv[1]), "run")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"run is in use by another run \(process {holder.pid} on \S+\); end it"):
        take_folder(tmp_path / "run", "run")


def test_the_lock_of_a_killed_run_is_taken_over(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"process {holder.pid}" in (tmp_path / "run" / ".lock").read_text()  # its name still stands there
    lock = take_folder(tmp_path / "run", "run")
    with pytest.raises(ValueError, match="in use by another run"):
        take_folder(tmp_path / "run", "run")
    lock.release()
    take_folder(tmp_path / "run", "run")


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    held = RunIdentity(model={"hidden_size": 64, "num_hidden_layers": 2}, seed=1, sequence_length=32)
    (tmp_path / "config.json").write_text(json.dumps({**held.to_json(), "command": ["..."]}))
    check_same_run(tmp_path, held)
    with pytest.raises(ValueError, match=r"holds another run: model.hidden_size: 64 -> 128; seed: 1 -> 2; name another --output"):
        check_same_run(tmp_path, replace(held, seed=2, model={"hidden_size": 128, "num_hidden_layers": 2}))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    check_same_run(tmp_path, RunIdentity(model={}))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no run; name a new or empty folder"):
        check_same_run(tmp_path, RunIdentity(model={}))


def test_a_start_that_found_no_space_for_its_config_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, source, run = RunIdentity(model={"hidden_size": 64}), tmp_path / "source", tmp_path / "run"
    for folder in (source, run):
        folder.mkdir()
    (source / "tokenizer.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(run_folder, "replace_json", full)
        write_config(run, identity.to_json(), source)
    check_same_run(run, identity)
    write_config(run, identity.to_json(), source)
    check_same_run(run, identity)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "tokenizer"]
    assert [path.name for path in (run / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_what_is_missing_beside_a_config_is_made_anew(tmp_path: Path) -> None:
    """Killed between the two: `config.json` stands, the tokenizer has not got its name."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/tokenizer.json").write_text("{}")
    run = tmp_path / "run"
    (run / ".tokenizer").mkdir(parents=True)
    (run / ".tokenizer/half.json").write_text("")
    (run / "config.json").write_text("{}")
    write_config(run, {}, tmp_path / "source")
    assert [path.name for path in (run / "tokenizer").iterdir()] == ["tokenizer.json"] and not (run / ".tokenizer").exists()


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.001, **params}}}


NOT_IN_THE_STATE = [
    (optimizer("AdamW", fused=True), optimizer("AdamW", fused=True, amsgrad=True), r"amsgrad: null -> true\), .* max_exp_avg_sq"),
    (optimizer("Adam", amsgrad=False), optimizer("Adam", amsgrad=True), r"amsgrad: false -> true\), .* max_exp_avg_sq"),
    (optimizer("RMSprop"), optimizer("RMSprop", momentum=0.9), r"momentum: null -> 0.9\), .* momentum_buffer"),
    (optimizer("RMSprop"), optimizer("RMSprop", lr=1, centered=True), r"centered: null -> true; lr: 0.001 -> 1\), .* grad_avg"),
]


@pytest.mark.parametrize(("held", "asked", "said"), NOT_IN_THE_STATE)
def test_settings_that_the_state_has_nothing_for_are_refused(held: dict, asked: dict, said: str, tmp_path: Path) -> None:
    """They were a KeyError in the first step, once `config.json` had them."""
    (tmp_path / "config.json").write_text(json.dumps({"deepspeed": held}))
    with pytest.raises(UserError, match=rf"was trained with other optimizer\.params \({said}, which those of the JSON need"):
        changed_settings(tmp_path, asked, deterministic=False)
    assert changed_settings(tmp_path, held, deterministic=False) == []


IN_THE_STATE = [
    (optimizer("AdamW", amsgrad=True), optimizer("AdamW", amsgrad=False)),
    (optimizer("AdamW", torch_adam=True, fused=True), optimizer("AdamW", lr=0.1, betas=[0.8, 0.9], weight_decay=0.5, eps=1e-6)),
    (optimizer("SGD"), optimizer("SGD", momentum=0.9, nesterov=True)),  # which begins at the first gradient
    (optimizer("Muon", muon_lr=0.02, momentum=0.95), optimizer("Muon", muon_lr=0.01, momentum=0.9)),
    (optimizer("Lion", betas=[0.9, 0.99]), optimizer("Lion", betas=[0.95, 0.98])),
]


@pytest.mark.parametrize(("held", "asked"), IN_THE_STATE)
def test_settings_that_the_state_has_all_for_are_told(held: dict, asked: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"deepspeed": held}))
    assert changed_settings(tmp_path, asked, deterministic=False)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_same_run(tmp_path, RunIdentity(model={}))


def test_a_folder_that_is_deleted_or_replaced_is_noticed_until_it_is_the_run_s(tmp_path: Path, synced: list[Path]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    watch = FolderWatch(folder)
    assert not watch.is_lost()
    folder.rename(tmp_path / "moved")
    assert watch.is_lost() and watch.is_lost() and not folder.exists()
    (tmp_path / "moved").rename(folder)
    assert not watch.is_lost(), "it is back"
    folder.rename(tmp_path / "moved")
    take_folder(folder, "run").release()
    assert folder.is_dir() and tmp_path in synced, "a save in it must survive a power cut"
    assert watch.is_lost(), "another folder of that name"
    watch.begin_anew()
    assert not watch.is_lost()


def test_the_folder_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    """Its checkpoints were pruned as this run's own, and its config.json was replaced."""
    config = {"model": {"layers": (1, 2)}, "rate": float("nan")}
    check_not_anothers(tmp_path, config)
    write_config(tmp_path, config, tmp_path)
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    check_not_anothers(tmp_path, config)  # a copy of the run in its place
    for content in ('{"model": {"layers": [1, 3]}, "rate": null}', "{", None):
        (tmp_path / "config.json").unlink() if content is None else (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="was replaced by the folder of another run, which is not written over"):
            check_not_anothers(tmp_path, config)
