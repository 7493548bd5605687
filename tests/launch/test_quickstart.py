"""The whole line by the quickstart's own commands, with fewer steps; then once more in the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setattr(launch.quickstart, "ROOT", tmp_path / "clone")
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
def test_a_cpu_that_has_no_product_of_bf16_trains_in_fp32(fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step took some twenty seconds without AVX-512, and 2.7 times fp32's with AVX-512 but without its bf16."""
    monkeypatch.setattr(launch.toolchain, "cpu_multiplies_bf16", lambda: fast)
    dtype, path = launch.quickstart.precision(tmp_path / "new")
    settings = json.loads((ROOT / path).read_text())
    assert dtype == ("bf16" if fast else "fp32") and ("bf16" in settings) == fast
    assert settings["train_batch_size"] == 16 and settings["expert_parallel"]["autoep_size"] == 2
