"""Checkpoints damaged on the disk: every kind of file, in every way, is passed over by name, and the run is the undisturbed one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Site, assert_same, last_saved, lost_bytes, struck

#: One file of every kind in a checkpoint of two ranks.
KINDS = (
    "mp_rank_00_model_states.pt",
    "layer_0_expert_1_mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "buffers.pt",
    "rng_00001.pt",
    "state.json",
    "manifest.json",
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped bit": flip, "truncation": truncate, "missing file": Path.unlink}
CASES = [
    pytest.param(kind, damage, id=f"{kind}-{damage}", marks=() if number % 3 == index else pytest.mark.slow)
    for number, kind in enumerate(KINDS)
    for index, damage in enumerate(DAMAGES)
]


@pytest.fixture(scope="module")
def stopped(site: Site) -> Path:
    """A run that was stopped after step 9, a new best: beside it the newest three that are not saved for that alone."""
    run = site.folder / "stopped"
    site.finish(run, stop_after=9)
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_4", "step_6", "step_8", "step_9"]
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_no_kind_of_file_is_left_out(stopped: Path) -> None:
    def kind(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    there = {kind(p.name) for p in (stopped / "checkpoints" / "step_9").iterdir()}
    assert there == {kind(name) for name in KINDS}


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_newest_checkpoint_is_passed_over(site: Site, whole: Path, run: Path, name: str, damage: str) -> None:
    DAMAGES[damage](run / "checkpoints" / "step_9" / name)
    said = site.finish(run).text()
    assert f"resuming from {run}/checkpoints/step_8" in said
    assert re.search(rf"passed over .*step_9/{re.escape(name)} ", said), said
    assert_same(run, whole)
    struck(f"{damage} in a checkpoint", lost_bytes(run))


@pytest.mark.parametrize("content", [None, b"", b"\xff\0garbage\n", b"step_777"], ids=["missing", "empty", "garbage", "nothing"])
def test_a_bad_pointer(site: Site, whole: Path, run: Path, content: bytes | None) -> None:
    pointer = run / "checkpoints" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert f"resuming from {run}/checkpoints/step_9" in site.finish(run).text()
    assert_same(run, whole)
    struck("bad pointer", lost_bytes(run))


def test_without_a_whole_checkpoint_nothing_is_started_over(site: Site, run: Path) -> None:
    for folder in (run / "checkpoints").glob("step_*"):
        flip(folder / "buffers.pt")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    running = site.start(run)
    assert running.wait() == [2, 2]
    errors = [line for line in running.text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "no whole checkpoint" in errors[0] and "buffers.pt is damaged" in errors[0]
    assert before == {p: p.read_bytes() for p in before} and last_saved(run) == "step_9"
    struck("every checkpoint damaged")


def test_a_damaged_token_shard_is_refused_by_name(site: Site, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(site.shards, shards)
    victim = next((shards / "train").glob("*.bin"))
    truncate(victim)
    running = site.start(tmp_path / "run", data=shards)
    assert running.wait() == [2, 2]
    assert running.text().count("error") == 1 and victim.name in running.text(), running.text()
    struck("damaged token shard")
