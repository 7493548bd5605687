"""`--profile N` on two real ranks: the table adds up to the step by the clock, and nothing that is trained changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from nursery import ROOT, Nursery
from support import metrics
from torch import nn

from launch.profiling.parts import PARTS
from launch.run.profile import StepProfile

TRAIN = str(ROOT / "launch" / "train.py")
#: What two ranks on CPUs that share their experts spend time on.
EXPECTED = set(PARTS) - {"compiled block", "idle"}


def start(nursery: Nursery, folder: Path, shards: Path, model: Path, name: str, *more: object) -> tuple[Path, str]:
    flags: dict[str, object] = {"data": shards, "model": model, "output": folder / name, "sequence_length": 128, "max_steps": 7}
    flags |= {"log_interval": 1, "eval_interval": 0, "save_interval": 100, "wandb": "disabled", "activation_checkpointing": "full"}
    command = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    ranks = nursery.start(2, TRAIN, *command, *more, log=folder / f"{name}.log")
    assert ranks.wait() == [0, 0], ranks.text()[-4000:]
    return folder / name, ranks.text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def profiled(nursery: Nursery, folder: Path, small_shards: Path, small_model: Path) -> tuple[Path, str]:
    return start(nursery, folder, small_shards, small_model, "profiled", "--profile", 2)


def test_the_parts_add_up_to_the_step(profiled: tuple[Path, str]) -> None:
    table = json.loads((profiled[0] / "profile" / "table.json").read_text())
    assert table["steps"] == 2 and list(table["ms"]) == list(PARTS)
    assert sum(table["ms"].values()) == pytest.approx(table["ms_of_a_step"], rel=0.02)
    assert {part for part, ms in table["ms"].items() if ms} == EXPECTED
    assert table["ms"]["other"] < 0.1 * table["ms_of_a_step"]  # names reach nearly everything


def test_every_rank_has_its_trace_and_rank_0_says_where(profiled: tuple[Path, str]) -> None:
    run, said = profiled
    assert sorted(p.name for p in (run / "profile").iterdir()) == [
        "table.json",
        "table.txt",
        "trace_rank0.json.gz",
        "trace_rank1.json.gz",
    ]
    assert said.count("profile: ") == 1 and said.count("where a step's time goes: ") == 1
    assert (run / "profile" / "table.txt").read_text() in said
    for rank in (0, 1):
        with gzip.open(run / "profile" / f"trace_rank{rank}.json.gz", "rt") as file:
            names = [e["name"] for e in json.load(file)["traceEvents"]]
        assert names.count("training step") == 2


def test_training_is_the_same_to_the_bit(
    profiled: tuple[Path, str], nursery: Nursery, folder: Path, small_shards: Path, small_model: Path
) -> None:
    plain, _ = start(nursery, folder, small_shards, small_model, "plain")
    trained = [
        [(row["loss"], row["grad_norm"], row["max_vio"]) for row in metrics(run) if "loss" in row] for run in (plain, profiled[0])
    ]
    assert len(trained[0]) == 7 and trained[0] == trained[1]


def test_a_run_that_is_over_before_says_so(folder: Path) -> None:
    said: list[str] = []
    profile = StepProfile(folder / "short", 5, nn.Linear(1, 1), [], SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    for _ in range(4):
        profile.after_step(0.1)
    profile.close()
    assert said == ["no profile: it begins with step 5 of a start, and this one took fewer"]
    assert not (folder / "short" / "profile").exists()
