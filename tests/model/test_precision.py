"""What stays fp32 in a bf16 engine, seen inside a real one (`engine_probe`): each row of the README's precision table."""

import json
from typing import Any

import pytest
from nursery import Nursery

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def seen(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ranks = nursery.start(1, "tests/model/engine_probe.py", log=tmp_path_factory.mktemp("engine") / "log")
    assert ranks.wait(300) == [0], ranks.text()[-3000:]
    return json.loads(ranks.text().strip().splitlines()[-1])


def test_weights_and_residual_stream_are_bf16(seen: dict[str, Any]) -> None:
    assert seen["parameters"] == ["torch.bfloat16"]
    assert seen["stream"] == "torch.bfloat16"


def test_router_is_fp32(seen: dict[str, Any]) -> None:
    assert seen["router_weights"] == "torch.float32"
    assert seen["router_rows"] == 128 and seen["router_wrong"] == 0
    assert seen["router_worst"] < 1e-5  # a bf16 score would be off by 2e-3


def test_correction_bias_is_fp32_and_takes_small_steps(seen: dict[str, Any]) -> None:
    assert seen["bias"] == "torch.float32" and seen["load"] == "torch.int64"
    assert seen["bias_values_kept"]  # 0.1, 0.101, ... are not bf16 numbers
    assert seen["balance_routers"] == 4 and seen["balance_tokens"] == [3 * 128 * 2] * 4
    assert seen["balance_worst"] < 1e-8


def test_rope_tables_are_fp32_up_to_position_8191(seen: dict[str, Any]) -> None:
    assert seen["rope"] == "torch.float32" and seen["rotated"] == "torch.bfloat16"
    assert seen["rope_worst"] < 6e-8  # fp32's rounding; a bf16 table would be off by 2e-3
    assert seen["shifted_8128"] < 0.015  # logits at positions 8,128 to 8,191 against 0 to 63: bf16 arithmetic


def test_norm_statistics_are_fp32(seen: dict[str, Any]) -> None:
    assert seen["norm_worst"] <= 2**-8  # one rounding to bf16 and no more


def test_softmax_is_fp32(seen: dict[str, Any]) -> None:
    assert seen["lse"] == "torch.float32"
    assert seen["attention_error"] < 0.005


def test_loss_is_fp32(seen: dict[str, Any]) -> None:
    assert seen["loss"] == "torch.float32"
    assert seen["loss_error"] < 2e-3  # the logits are products of bf16 rounded once


def test_deepspeeds_checkpointing_changes_nothing(seen: dict[str, Any]) -> None:
    assert seen["checkpointing_equal"]
    assert len(set(seen["checkpointing_losses"])) == 3


def test_the_bias_survives_expert_parallelism(seen: dict[str, Any]) -> None:
    assert seen["auto_ep"] == "AutoEPMoELayer"
    assert seen["auto_ep_bias"] == "torch.float32" and seen["auto_ep_bias_kept"]
