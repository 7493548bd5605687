"""Checkpoints whose checksums are right and whose content is not: whoever can write the files can write the manifest.

By the command itself; every kind of file and of content is in `tests/launch/checkpoint/`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from runs import Site, struck
from stub_engine import Payload, replace_file

from launch.checkpoint.unpickle import load_file

OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def test_nan_in_a_checkpoint_is_refused_by_the_parameters_name(site: Site, whole: Path, tmp_path: Path) -> None:
    """It was trained on: one step skipped, exit code 0, and NaN in the exported embedding of a token that did not come up."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    checkpoint = run / "checkpoints" / "step_12"
    content = load_file(checkpoint / OPTIMIZER, mmap=False)
    masters = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    masters[0][-1] = math.nan
    replace_file(checkpoint, OPTIMIZER, content)
    refused = site.start(run, max_steps=14)
    assert refused.wait() == [2, 2], refused.text()[-3000:]
    struck("NaN in a checkpoint with right sums")
    [said] = [line for line in refused.text().splitlines() if line.startswith("error")]
    assert f"step_12/{OPTIMIZER}: " in said and ".weight holds numbers that are not finite" in said
    older = site.finish(run, max_steps=14, resume=run / "checkpoints" / "step_8").text()
    assert "step_8 (step 8" in older


def test_code_in_a_checkpoint_is_not_run_by_a_resume_on_other_ranks(
    site: Site, whole: Path, small_model: Path, tmp_path: Path
) -> None:
    run, marker = tmp_path / "run", tmp_path / "struck"
    shutil.copytree(whole, run)
    checkpoint = run / "checkpoints" / "step_12"
    content = load_file(checkpoint / OPTIMIZER, mmap=False)
    replace_file(checkpoint, OPTIMIZER, {**content, "x": Payload(marker)})
    torch.load(checkpoint / OPTIMIZER, weights_only=False)
    assert marker.is_dir(), "the payload was to strike here"
    marker.rmdir()
    refused = replace(site, ranks=1, folder=tmp_path).start(run, max_steps=14)
    assert refused.wait() == [2], refused.text()[-3000:]
    struck("code in a checkpoint with right sums")
    assert "holds something other than tensors" in refused.text() and not marker.exists()
