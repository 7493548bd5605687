"""The whole line by the quickstart's own commands, with fewer steps; then once more in the same folder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, metrics

import launch.quickstart
import launch.toolchain


def quickstart(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/quickstart.py", "--folder", str(folder), "--steps", "8"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("flags", [["--folder", "mine"], []])
def test_a_folder_is_meant_from_where_one_stands(flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(launch.quickstart, "CLONE", tmp_path / "clone")
    monkeypatch.setattr(launch.quickstart, "run", lambda folder, steps: made.append(folder.resolve()))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
    (tmp_path / "clone").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    launch.quickstart.main()
    assert made == [tmp_path / ("work/mine" if flags else "clone/runs/quickstart")] and made[0].is_dir()


@pytest.mark.parametrize("folder", ["/proc/none", "a file"])
def test_a_folder_that_cannot_be_made_is_a_sentence(folder: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    done = quickstart(tmp_path / folder)
    assert done.returncode == 2 and f"error: --folder {tmp_path / folder} cannot be made: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_steps_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "launch/quickstart.py", "--steps", "0", "--folder", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: --steps must be at least 1, not 0\n" and list(tmp_path.iterdir()) == []


@pytest.fixture
def stations(monkeypatch: pytest.MonkeyPatch) -> list[int | type[BaseException]]:
    """How the stations end, which do nothing here: exit codes or Ctrl-C, 0 where none is left."""
    ends: list[int | type[BaseException]] = []

    def take(command: list[str], **_: object) -> subprocess.CompletedProcess:
        end = ends.pop(0) if ends else 0
        if not isinstance(end, int):
            raise end
        return subprocess.CompletedProcess(command, end)

    monkeypatch.setattr(launch.quickstart.subprocess, "run", take)
    monkeypatch.setattr(launch.quickstart, "precision", lambda: ("fp32", Path("fp32.json")))
    return ends


@pytest.mark.parametrize(
    ("python", "flags", "again"),
    [
        (".venv/bin/python", [], "make quickstart"),
        ("conda/bin/python", [], "python3 quickstart.py"),  # make would install another environment
        (
            ".venv/bin/python",
            ["--folder", "/tmp/my runs", "--steps", "50"],
            "python3 quickstart.py --folder '/tmp/my runs' --steps 50",
        ),
    ],
)
@pytest.mark.parametrize("end", [2, KeyboardInterrupt])
def test_what_goes_on_from_here_is_what_was_typed(
    end: int | type[BaseException],
    python: str,
    flags: list,
    again: str,
    stations: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """`make quickstart` begins in another folder."""
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "quickstart.py", *flags])
    monkeypatch.setattr(sys, "executable", str(ROOT / python))
    stations += [0, end]
    assert launch.quickstart.run(Path("folder"), 50) == (130 if end is KeyboardInterrupt else end)
    assert f"`{again}` goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["active", "another", "none", "no environment"])
def test_its_last_words_begin_with_what_they_need(
    kind: str, stations: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whoever typed `make quickstart` has no environment active, nor always a `python`, and may stand anywhere."""
    clone, other = tmp_path / "my clone", tmp_path / "bin"
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    other.mkdir()
    for link in (python, other / "python") if kind != "none" else (python,):
        link.symlink_to(sys.executable)
    if kind != "no environment":
        (python.parent / "activate").touch()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(launch.quickstart, "CLONE", clone)
    monkeypatch.setenv("PATH", str(python.parent if kind == "active" else other))
    launch.quickstart.run(Path("folder"), 50)
    then = {"active": "", "no environment": f" && export PATH={shlex.quote(str(python.parent))}:$PATH"}
    wanted = f"    cd {shlex.quote(str(clone))}{then.get(kind, ' && source .venv/bin/activate')}\n    python launch/generate.py "
    assert wanted in capsys.readouterr().out


def test_make_leaves_the_path_as_it_is(tmp_path: Path) -> None:
    """With .venv/bin before it nobody can tell whether what is typed next finds `python`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$1 $PATH"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "installed").write_text(f"{ROOT}\n")
    done = subprocess.run(
        ["make", "--silent", "quickstart", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"launch/quickstart.py {os.environ['PATH']}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


def test_every_station(finished: tuple) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["val_loss"] for row in metrics(folder / "run") if "val_loss" in row]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert losses[-1] < losses[0] - 0.5
    # bf16 weights of the export against the training engine's own, on the whole split instead of its first samples
    assert abs(evaluation["loss"] - losses[-1]) < 0.5
    assert evaluation["perplexity"] == pytest.approx(2.718281828459045 ** evaluation["loss"])
    page = (folder / "report.html").read_text()
    assert "finished" in page and f"{evaluation['loss']:.4g}" in page
    assert "def read_lines(path):" in done.stdout.split("[6/6]")[1].split("Done in")[0].split("$")[1]


def test_output_is_quiet(finished: tuple) -> None:
    said, _generated = finished[1].stdout.split("[6/6]")  # eight steps write "warning" as readily as another word
    text = said + finished[1].stderr
    assert [line for line in text.splitlines() if "warning" in line.lower() or "Traceback" in line] == []


def test_a_second_time_goes_on_from_what_is_there(finished: tuple) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file()}
    said = ""
    for _, command in launch.quickstart.commands(folder, 8)[:3]:  # the others only read what these three find
        again = subprocess.run(command, cwd=ROOT, env=launch.quickstart.environment(), capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr[-3000:]
        said += again.stderr
    assert "step_8" in said and "finished at step 8" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_has_no_product_of_bf16_trains_in_fp32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step took some twenty seconds without AVX-512, and 2.7 times fp32's with AVX-512 but without its bf16."""
    monkeypatch.setattr(launch.toolchain, "cpu_multiplies_bf16", lambda: fast)
    dtype, path = launch.quickstart.precision()
    settings = json.loads((ROOT / path).read_text())
    assert dtype == ("bf16" if fast else "fp32") and ("bf16" in settings) == fast
    assert settings["train_batch_size"] == 16 and settings["expert_parallel"]["autoep_size"] == 2
