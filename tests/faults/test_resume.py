"""A run that was stopped and resumed is the uninterrupted run, to the bit: losses, norms, loads, rates, biases, moments."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nursery import ROOT
from runs import STEPS, Site, assert_same, content, deepspeed_json, last_saved, rows


def test_the_comparison_can_fail(site: Site, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_seed"
    site.finish(other, seed=4321)
    assert content(other) != content(whole)
    with pytest.raises(AssertionError):
        assert_same(other, whole)


def test_two_runs_are_the_same(site: Site, whole: Path, tmp_path: Path) -> None:
    site.finish(tmp_path / "again")
    assert_same(tmp_path / "again", whole)


@pytest.mark.parametrize("stops", [(5, 6, 11), *(pytest.param((n,), marks=pytest.mark.slow) for n in range(1, STEPS))], ids=str)
def test_stopped_and_resumed(site: Site, whole: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """At any step, at a step that evaluates, twice in a row."""
    run = tmp_path / "run"
    for stop in stops:
        site.finish(run, stop_after=stop)
        assert last_saved(run) == f"step_{stop}"
    resumed = site.finish(run)
    assert f"resuming from {run / 'checkpoints'}/step_{stops[-1]}" in resumed.text()
    assert_same(run, whole)


def test_at_the_edge_of_an_epoch(site: Site, tmp_path: Path) -> None:
    """Some 50 samples, no multiple of the batch of 8: stopped right before the edge, in the step across it, behind it."""
    source = tmp_path / "code"
    source.mkdir()
    (source / "one.py").write_text(Path(json.__file__).read_text()[:6000])
    shards = tmp_path / "shards"
    command = [sys.executable, "data/preprocess.py", "--input", str(source), "--tokenizer", str(site.shards / "tokenizer")]
    command += ["--output", str(shards), "--validation_fraction", "0", "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    flags = {"data": shards, "eval_interval": 0, "sequence_length": 64}
    undisturbed = site.finish(tmp_path / "whole", **flags).text()
    epoch = int(undisturbed.split(" samples of 64 tokens")[0].split()[-1].replace(",", ""))
    assert 20 < epoch < 88 and epoch % 8, undisturbed
    for stop in (epoch // 8, epoch // 8 + 1, epoch // 8 + 2):
        site.finish(tmp_path / "run", stop_after=stop, **flags)
    site.finish(tmp_path / "run", **flags)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_with_deterministic_algorithms_a_cpu_computes_the_same(site: Site, whole: Path, tmp_path: Path) -> None:
    """The flag from a checkpoint on, which is said: on CPUs every sum has its order without it."""
    run = tmp_path / "run"
    site.finish(run, stop_after=5)
    said = site.finish(run, extra=["--deterministic"]).text()
    assert "changed since this checkpoint's run, and used from the first step on: --deterministic: false -> true" in said
    assert_same(run, whole)


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_under_every_zero_stage(site: Site, tmp_path: Path, stage: int, mode: str) -> None:
    """ZeRO 2 is in all other tests. Under ZeRO 3 the first step after a load once ended with DeepSpeed's "tracing error"."""
    alone = replace(site, ranks=1, folder=tmp_path)
    zero = {"stage": stage, "reduce_bucket_size": 20000, "stage3_prefetch_bucket_size": 20000}
    config = deepspeed_json(1, zero_optimization=zero, activation_checkpointing={"mode": mode})
    (tmp_path / "ds_1.json").write_text(json.dumps(config))
    alone.finish(tmp_path / "whole", eval_interval=4)
    for stop in (5, 9):
        alone.finish(tmp_path / "run", stop_after=stop, eval_interval=4)
    alone.finish(tmp_path / "run", eval_interval=4)
    logged = [{json.dumps(row) for row in rows(tmp_path / name)} for name in ("run", "whole")]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS + 4
    # ZeRO 3's optimizer file has the same values, but pickles a loss scaler that was loaded by other references than a new one.
    files = [content(tmp_path / name) for name in ("run", "whole")]
    same = {name for name in files[0] if files[0][name] == files[1][name]}
    assert all(name in same or name.endswith("optim_states.pt") for name in files[0]) and "state.json" in same


@pytest.mark.parametrize("others", [(1,), pytest.param((4, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_on_other_numbers_of_ranks(site: Site, small_model: Path, tmp_path: Path, others: tuple[int, ...]) -> None:
    """Two ranks with EP 2 until step 5, then by itself on others: the same samples, the losses of two ranks to rounding."""
    run, flags = tmp_path / "run", {"model": small_model, "eval_interval": 0, "save_interval": 100}
    site.finish(tmp_path / "whole", **flags)
    site.finish(run, stop_after=5, **flags)
    before = 2
    for number, ranks in enumerate(others, 6):
        said = (
            replace(site, ranks=ranks, folder=tmp_path).finish(run, stop_after=number if ranks != others[-1] else 0, **flags).text()
        )
        assert f"world_size: {before} -> {ranks}" in said and f"ep_size: {before} -> {ranks}" in said, said
        before = ranks
    expected, found = ({row["step"]: row for row in rows(path) if "loss" in row} for path in (tmp_path / "whole", run))
    assert [found[step]["samples"] for step in found] == [8 * step for step in range(1, STEPS + 1)]
    assert all(found[step] == expected[step] for step in range(1, 6))
    for step in range(6, STEPS + 1):
        assert found[step]["lr"] == pytest.approx(expected[step]["lr"], rel=1e-12)
        # bf16 sums in another order; a wrong bias, moment or sample moves a loss by more
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], abs=2e-3 if step == 6 else 2e-2), step


def test_a_resumed_run_obeys_its_json(site: Site, tmp_path: Path) -> None:
    """A rate of 0 from the first step on: no weight moves any more. Saved rates, decay and clipping would move them."""
    run, changed = tmp_path / "run", tmp_path / "changed.json"
    site.finish(run, stop_after=5, eval_interval=0)
    config = deepspeed_json(2, gradient_clipping=0.01)
    config["optimizer"]["params"].update(lr=0.0, weight_decay=0.5)
    changed.write_text(json.dumps(config))
    said = site.finish(run, stop_after=7, eval_interval=0, deepspeed_config=changed).text()
    for words in ("lr: 0.01 -> 0.0", "optimizer.params.weight_decay: 0.01 -> 0.5", "gradient_clipping: 1.0 -> 0.01"):
        assert words in said, said
    assert [row["lr"] for row in rows(run) if "lr" in row and row["step"] > 5] == [0.0, 0.0]
    before, after = (
        torch.load(run / "checkpoints" / f"step_{step}" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for step in (5, 7)
    )
    assert all(torch.equal(before[name], after[name]) for name in before if "bias" not in name) and len(before) > 10
    config["optimizer"]["type"] = "SGD"
    config["optimizer"]["params"] = {"lr": 0.1}
    changed.write_text(json.dumps(config))
    refused = site.start(run, deepspeed_config=changed)
    assert refused.wait() == [2, 2]
    assert "optimizer.type AdamW, and SGD, which the JSON asks for, cannot go on from its state" in refused.text()


def test_what_is_compared_is_not_trivial(whole: Path) -> None:
    steps = [row for row in rows(whole) if "loss" in row]
    assert len({row["loss"] for row in steps}) == len(steps)
    files = content(whole)
    assert files["rng_00000.pt"] != files["rng_00001.pt"], "each rank draws its own dropout"
    assert len({row["lr"] for row in steps}) >= len(steps) - 1  # DeepSpeed takes the first two steps at rate 0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(layer > 0 for layer in steps[-1]["bias_range"])
    assert sum("val_loss" in row for row in rows(whole)) == 3
