"""The model's router and experts inside AutoEP's layers: two ranks, EP 2, ZeRO-2, bf16. And such layers as are refused."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed.module_inject.auto_ep_layer as auto_ep_layer
import pytest
import torch
from nursery import Nursery
from torch import nn

from launch.engine.expert_parallel import check_swapped, model_parts
from launch.engine.moe_layer import MoELayer
from model import MoEGPTConfig
from model.router import Gate

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


CONFIG = MoEGPTConfig.preset("tiny", num_hidden_layers=2)


def swapped() -> nn.ModuleList:
    """Two layers as `check_swapped` looks at them."""
    layers = nn.ModuleList()
    for _ in range(2):
        layer = MoELayer.__new__(MoELayer)
        nn.Module.__init__(layer)
        layer.router, layer.shared_experts = Gate(CONFIG), nn.Identity()
        layers.append(layer)
    return layers


def test_a_layer_that_was_swapped_otherwise_is_refused() -> None:
    check_swapped(layers := swapped(), CONFIG)
    layers[1].router._buffers["e_score_correction_bias"] = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"layer 1: the correction bias must be an fp32 buffer, it is torch\.bfloat16"):
        check_swapped(layers, CONFIG)
    (layers := swapped())[1].router._buffers.clear()
    layers[1].router.e_score_correction_bias = nn.Parameter(torch.zeros(8))
    with pytest.raises(RuntimeError, match="layer 1: the correction bias must be an fp32 buffer, it is missing"):
        check_swapped(layers, CONFIG)
    (layers := swapped())[1].router = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="layer 1: AutoEP built its own router, Linear"):
        check_swapped(layers, CONFIG)


def test_autoep_is_its_own_again_also_after_an_error() -> None:
    names = ("TokenChoiceTopKRouter", "GroupedExperts", "AutoEPMoELayer")
    before = [getattr(auto_ep_layer, name) for name in names]
    with pytest.raises(KeyError), model_parts(CONFIG):
        assert auto_ep_layer.AutoEPMoELayer is MoELayer
        raise KeyError
    assert [getattr(auto_ep_layer, name) for name in names] == before
