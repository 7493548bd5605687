"""Steps that are skipped: NaN or a spike on one rank only, refused by all ranks together, in a run that resumes to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nursery import ROOT
from runs import STEPS, Site, assert_same, content, last_saved, lost_bytes, rows, struck

FAULTY = str(ROOT / "tests" / "faults" / "faulty_train.py")
BATCH = 8


def skipped(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "skipped" in row]


def test_nan_on_one_rank_skips_the_step_on_all(site: Site, whole: Path, tmp_path: Path) -> None:
    fault = {"script": FAULTY, "env": {"FAULT": "nan"}, "health_interval": 1}
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    said = site.finish(run, **fault).text()
    (row,) = skipped(run)
    assert row["step"] == 6 and row["skipped"] == "loss is nan" and row["skipped_samples"] == [5 * BATCH, 6 * BATCH]
    assert "step 6 skipped, weights unchanged: loss is nan (samples 40 to 47)" in said
    assert all(math.isfinite(row["loss"]) for row in rows(run) if "loss" in row and row["step"] != 6)
    before, after = ([r for r in rows(path) if "loss" in r] for path in (whole, run))
    assert before[:5] == after[:5]
    # The schedule did not advance, nothing was counted, and the next batch is the next one, by weights that did not see the last.
    assert after[4]["lr"] != after[5]["lr"] == after[6]["lr"]
    assert after[6]["samples"] == 7 * BATCH and content(run) != content(whole)
    # Every load map is of one step's tokens, the one after the skipped step too: its batch of 32 tokens, two experts each.
    loads = {row["step"]: row["expert_load"] for row in rows(run) if "expert_load" in row}
    assert list(loads) == [step for step in range(1, STEPS + 1) if step != 6]
    assert {sum(layer) for load in loads.values() for layer in load} == {BATCH * 32 * 2}
    struck("NaN on one rank", lost_bytes(run))

    site.finish(stopped, stop_after=7, **fault)
    site.finish(stopped, **fault)
    assert_same(stopped, run)


def test_several_in_a_row_go_back_to_the_last_checkpoint_and_leave_the_batches_out(site: Site, tmp_path: Path) -> None:
    """Of which step 8 is saved, and all that --keep_last 1 keeps: nothing was left to go back to."""
    run = tmp_path / "run"
    fault = {"FAULT": "nan", "FAULT_SAMPLES": "40,48,56,64"}
    said = site.finish(run, script=FAULTY, env=fault, spike_rollback=4, eval_interval=4, patience=1, keep_last=1).text()
    assert "saved step_8" in said.split("rolled back to step 4; going on with sample 72")[0]
    assert [(row["step"], row["samples"]) for row in skipped(run)] == [(6, 48), (7, 56), (8, 64), (9, 72)]
    assert [row["step"] for row in rows(run) if "val_loss" in row] == [0, 4, 8, 8, STEPS], (
        "not step 4 once more, as one without a best"
    )
    state = json.loads((run / "checkpoints" / last_saved(run) / "state.json").read_text())
    assert state["step"] == STEPS and state["samples"] == 72 + (STEPS - 4) * BATCH and state["tokens"] == 32 * state["samples"]
    assert state["extra"]["guard"]["skipped_in_all"] == 4 and state["extra"]["guard"]["skipped_in_a_row"] == 0
    again = [row for row in rows(run) if "loss" in row][-(STEPS - 4) :]
    assert [row["step"] for row in again] == list(range(5, STEPS + 1)) and again[0]["samples"] == 72 + BATCH
    struck("NaN in four steps in a row", lost_bytes(run))


def test_a_run_that_never_comes_past_a_place_ends(site: Site, tmp_path: Path) -> None:
    fault = {"FAULT": "nan", "FAULT_SAMPLES": ",".join(str(n) for n in range(40, 800, 8))}
    running = site.start(tmp_path / "run", script=FAULTY, env=fault, spike_rollback=2)
    assert running.wait() == [2, 2]
    assert running.text().count("rolled back to step 4") == 3
    assert "error: 2 steps in a row were skipped and 3 times back at step 4; lower the learning rate" in running.text()


def test_nan_before_the_first_checkpoint_ends_the_run(site: Site, tmp_path: Path) -> None:
    fault = {"FAULT": "nan", "FAULT_SAMPLES": "8,16"}
    running = site.start(tmp_path / "run", script=FAULTY, env=fault, spike_rollback=2)
    assert running.wait() == [2, 2]
    assert "there is no checkpoint to roll back to" in running.text() and "Traceback" not in running.text()


def test_a_spike_is_skipped_and_off_by_a_flag(site: Site, tmp_path: Path) -> None:
    """A finite loss that is far out, after enough steps to know what is usual."""
    fault = {"script": FAULTY, "env": {"FAULT": "spike", "FAULT_SAMPLES": str(36 * BATCH)}}
    long = {"max_steps": 40, "eval_interval": 0, "save_interval": 40}
    site.finish(tmp_path / "on", **fault, **long)
    site.finish(tmp_path / "off", **fault, **long, spike_sigma=0)
    (row,) = skipped(tmp_path / "on")
    assert row["step"] == 37 and "sigma above its mean" in row["skipped"] and math.isfinite(row["loss"])
    assert not skipped(tmp_path / "off")
    on, off = ([r["loss"] for r in rows(tmp_path / name)] for name in ("on", "off"))
    assert on[:37] == off[:37] and on[37:] != off[37:]
