"""Every file of ds_configs/ trains: two ranks, the real engine, a tiny model, a few steps on one batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nursery import Nursery

from launch.engine.strategy import CONFIG_FOLDER

FILES = sorted(CONFIG_FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def results(nursery: Nursery, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("strategies") / "results.json"
    worker = "tests/launch/strategies_worker.py"
    ranks = nursery.start(2, worker, small_model, output, *FILES, log=output.with_name("log"))
    assert ranks.wait(500) == [0, 0], ranks.text()[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_trains(path: Path, results: dict) -> None:
    wanted, result = json.loads(path.read_text()), results[path.name]
    if "offload" in path.name and not shutil.which("g++"):
        pytest.skip("DeepSpeed's CPU Adam is compiled at the first use, and there is no C++ compiler")
    assert "error" not in result, result.get("trace")
    # The first step has learning rate 0; after it the loss on the one batch must fall.
    assert result["losses"][-1] < result["losses"][0] - 0.005, result["losses"]
    assert all(0 < norm < 100 for norm in result["norms"])
    assert result["ranks_agree"], "each rank has a gradient norm of its own"
    assert result["stage"] == wanted["zero_optimization"]["stage"]
    assert result["ep_size"] == min(2, wanted["expert_parallel"]["autoep_size"])
    assert result["recomputes"] == (wanted["activation_checkpointing"]["mode"] != "none")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_refused_step_leaves_nothing_behind(path: Path, results: dict) -> None:
    """No weight, master, moment or rate moves, and no gradient stays to be added to the next step's: it is the same step anew."""
    if "offload" in path.name and not shutil.which("g++"):
        pytest.skip("DeepSpeed's CPU Adam is compiled at the first use, and there is no C++ compiler")
    result = results[path.name]
    assert result["unmoved"] and result["moved"], "refused, then taken"
    assert result["again"] == pytest.approx(result["refused"], rel=1e-6)


def test_strategies_agree(results: dict) -> None:
    """The same bf16 model on the same batch: where only the layout differs, so do only the roundings."""
    first = {name: result["losses"][0] for name, result in results.items() if "error" not in result}
    assert len(first) >= 7
    assert max(first.values()) - min(first.values()) < 2e-3, first
    # Muon's is taken after its own step.
    norms = {name: results[name]["norms"][0] for name in first if "muon" not in name}
    assert max(norms.values()) < 1.03 * min(norms.values()), norms
