"""The step's benchmark: who takes part, what its table shows, and that what goes without DeepSpeed trains the same."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from nursery import Nursery

from data.cli import UserError
from launch.benchmarks import contestant_processes
from launch.benchmarks.contestant_processes import PHASES
from launch.benchmarks.contestants import ALONE, CONTESTANTS
from launch.benchmarks.step import COLUMNS, check_room, chosen, job_of, prediction, together
from launch.cli import AgreedError
from launch.engine import strategy
from model import MoEGPTConfig


@pytest.fixture(scope="module")
def measured(nursery: Nursery, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("step")
    command = ["tests/launch/benchmarks/step_worker.py", small_model, folder / "out.json"]
    ranks = nursery.start(1, *command, log=folder / "log")
    assert ranks.wait(240) == [0], ranks.text()[-4000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return {**found, "said": ranks.text()}


def test_all_take_part_and_the_figures_are_those_of_their_steps(measured: dict[str, Any]) -> None:
    result = measured["result"]
    assert list(result["contestants"]) == list(CONTESTANTS) and result["settings"]["recomputation"] == "full"
    ours = result["contestants"]["ours"]
    for name, row in result["contestants"].items():
        assert set(COLUMNS) <= set(row) and len(row["steps"]) == 2 and name in measured["said"]
        totals = [sum(step[phase] for phase in PHASES) for step in row["steps"]]
        assert row["total_ms"] == pytest.approx(1e3 * statistics.median(totals))
        pairs = [total / sum(step[phase] for phase in PHASES) for total, step in zip(totals, ours["steps"], strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(pairs))
        pairs = [theirs["cpu"] / step["cpu"] for theirs, step in zip(row["steps"], ours["steps"], strict=True)]
        assert row["cpu_ratio"] == pytest.approx(statistics.median(pairs))
        assert all(step[phase] > 0 for step in row["steps"] for phase in PHASES)
    assert ours["ratio"] == 1 and result["predicted"] is None  # of a CPU nobody has a data sheet


def plain_stage(layers: int, micro_batch: int) -> Namespace:
    path = strategy.CONFIG_FOLDER / "ep1_zero2.json"
    settings = strategy.read_config(path)
    settings.update(train_batch_size="auto", train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=1)
    settings = strategy.resolve_config(settings, path, world_size=1, num_experts=8, max_steps=10)
    return Namespace(config=MoEGPTConfig.preset("800m", num_hidden_layers=layers), settings=settings, mode="none")


def test_what_does_not_fit_onto_the_card_together_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They ran out of memory there, one after the other kept what it had needed."""
    told: list[str] = []
    monkeypatch.setattr("data.terminal.say", told.append)
    shared = Namespace(sequence_length=2048, attn_implementation="flash")
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cuda")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (83e9, 85e9))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda free, op: free.fill_(80e9))  # another rank's GPU has less
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(AgreedError) as refused:
        check_room(list(CONTESTANTS), plain_stage(24, 8), 1, shared)
    said = re.search(
        r"5 contestants share a GPU and need at least ([\d.]+) GB of it, 80.0 GB are free; take --layers (\d+) or",
        str(refused.value),
    )
    assert said and 5 * 28.4 < float(said[1]) < 207  # ours alone by the plan, and what was counted of all
    layers = int(said[2])
    check_room(list(CONTESTANTS), plain_stage(layers, 8), 1, shared)
    assert len(told) == 1 and "5 contestants share a GPU and need at least" in told[0] and told[0].endswith("80.0 GB are free")
    with pytest.raises(AgreedError):
        check_room(list(CONTESTANTS), plain_stage(layers + 1, 8), 1, shared)
    check_room(["ours", "stock AutoEP"], plain_stage(24, 8), 1, shared)
    job = job_of(plain_stage(24, 8), 1, shared)
    alone, beside = (together(names, job) for names in (["ours"], ["ours", "stock AutoEP"]))
    assert beside - 2 * alone == pytest.approx(8.2e9, rel=0.02)  # the peer's logits, as roofline counts them


def test_on_a_known_gpu_the_plan_stands_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.engine.hardware.gpu_name", lambda: "NVIDIA H200")
    path = strategy.CONFIG_FOLDER / "ep1_zero2.json"
    settings = strategy.resolve_config(strategy.read_config(path), path, world_size=1, num_experts=8, max_steps=10)
    stage = Namespace(config=MoEGPTConfig.preset("800m"), settings=settings, mode="none")
    job = {"sequence_length": 2048, "attn_implementation": "flash"}
    half = prediction(stage, 1, Namespace(**job), 1.0)
    whole = prediction(stage, 1, Namespace(**job), 2.0)
    assert half is not None and whole is not None and half["device"] == "h200" and 0.3 < half["mfu"] < 0.5
    assert whole["measured_to_predicted"] == 2 * half["measured_to_predicted"] == pytest.approx(2e3 / half["total_ms"])


def test_without_deepspeed_it_is_the_same_training(measured: dict[str, Any]) -> None:
    ours, plain = measured["losses"]["ours"], measured["losses"]["ours without DeepSpeed"]
    assert ours == pytest.approx(plain, abs=4e-3)  # bf16, another order of sums
    assert ours[0] - ours[-1] > 0.03  # and the weights have moved by more


def test_several_ranks_have_no_plain_contestants() -> None:
    assert set(chosen(None, 2)) == set(CONTESTANTS) - set(ALONE)
    assert chosen(["stock AutoEP"], 2) == ["ours", "stock AutoEP"]
    with pytest.raises(UserError, match=r"'ours without DeepSpeed' is none of 'ours', .* on 2 ranks"):
        chosen(["ours without DeepSpeed"], 2)


ENDS = [(lambda: os._exit(3), None), (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL")]


@pytest.mark.parametrize(("end", "by"), ENDS)
def test_a_contestant_that_ends_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[], None], by: str | None
) -> None:
    """With its own exit code where it has said why, else with a sentence."""
    monkeypatch.setattr(contestant_processes, "START", "fork")
    monkeypatch.setattr(contestant_processes, "serve", lambda *_: end())
    error = pytest.raises(UserError, match=f"ours: its process has ended by {by}") if by else pytest.raises(SystemExit, match="3")
    with error, contestant_processes.contestants(["ours", "stock AutoEP"], Namespace()) as remotes:
        remotes[0].build()
    assert not any(remote.process.is_alive() for remote in remotes)
