"""The model's router and experts inside AutoEP's layers: two ranks, EP 2, ZeRO-2, bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nursery import Nursery

TOKENS, TOP_K, LAYERS, STEPS = 2 * 64, 2, 2, 3


@pytest.fixture(scope="module")
def ranks(nursery: Nursery, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("expert_parallel") / "results.json"
    worker = "tests/launch/engine/expert_parallel_worker.py"
    ranks = nursery.start(2, worker, small_model, output, log=output.with_name("log"))
    assert ranks.wait(300) == [0, 0], ranks.text()[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_repeats_routing_and_dropout(ranks: list[dict], mode: str) -> None:
    """To the bit: losses, gradient norms and weights of three steps, with dropout in the experts."""
    for result in ranks:
        found, plain = ({**result[name], "collectives": None} for name in (f"dropout_{mode}", "dropout_none"))
        assert found == plain


def test_selective_repeats_no_collective(ranks: list[dict]) -> None:
    """Per layer the counts, the rows there and back, their gradients and the weights'; recomputation repeats the first three."""
    for result in ranks:
        plain, selective, full = (result[f"dropout_{mode}"]["collectives"] for mode in ("none", "selective", "full"))
        assert selective == plain
        assert plain["alltoall_base_"] == 6 * LAYERS and full["alltoall_base_"] == 9 * LAYERS


def test_dropout_drops_in_training_only(ranks: list[dict]) -> None:
    for result in ranks:
        first, second, without = result["evaluations"]
        assert first == second == without
        a, b = result["training_forward"]
        assert a != b and a != first
        assert result["dropout_none"]["losses"] != result["plain"]["losses"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_each_token_is_counted_once(ranks: list[dict], mode: str) -> None:
    for result in ranks:
        assert result[f"dropout_{mode}"]["loads"] == [STEPS * TOKENS * TOP_K] * LAYERS
        assert result["loads_after_evaluation"] == [0] * LAYERS


def test_router_and_bias_are_fp32_in_a_bf16_engine(ranks: list[dict]) -> None:
    bf16, fp32 = "torch.bfloat16", "torch.float32"
    assert ranks[0]["dtypes"] == {"weights": fp32, "router_input": bf16, "output": bf16, "bias": fp32, "gate": bf16}
