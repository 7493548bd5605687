"""What the DeepSpeed JSON's section switches in the model's blocks, and in DeepSpeed's checkpoint function."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch

from launch.engine import activation_checkpointing
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.modeling import Block

SECTION = {
    "cpu_checkpointing": "checkpoint_in_cpu",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}


@pytest.fixture
def model() -> MoEGPTForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "vocab_size": 64}
    return MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **sizes))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What DeepSpeed is told, on a GPU."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(deepspeed.checkpointing, "configure", lambda _, **settings: found.update(settings))
    monkeypatch.setattr(activation_checkpointing, "trains_on_gpu", lambda: True)
    return found


@pytest.mark.parametrize(("mode", "rebuilds", "recomputes"), [("none", 0, 0), ("selective", 2, 0), ("full", 0, 2)])
def test_a_mode_switches_every_block(
    mode: str, rebuilds: int, recomputes: int, model: MoEGPTForCausalLM, told: dict[str, Any]
) -> None:
    activation_checkpointing.enable(model, mode, {})
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert sum(block.rebuilds for block in blocks) == rebuilds
    assert sum(block.gradient_checkpointing for block in blocks) == recomputes
    assert bool(told) == (mode == "full")


@pytest.mark.parametrize("key", SECTION)
def test_a_key_of_the_section_reaches_deepspeed_under_its_name_there(
    key: str, model: MoEGPTForCausalLM, told: dict[str, Any]
) -> None:
    activation_checkpointing.enable(model, "full", {"activation_checkpointing": {key: True}})
    assert {name for name, value in told.items() if value} == {SECTION[key]}


def test_on_a_cpu_nothing_is_moved_to_the_host(
    model: MoEGPTForCausalLM, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there, and DeepSpeed's copy would free the tensor that it aliases."""
    monkeypatch.setattr(activation_checkpointing, "trains_on_gpu", lambda: False)
    activation_checkpointing.enable(model, "full", {"activation_checkpointing": {"cpu_checkpointing": True}})
    assert told["checkpoint_in_cpu"] is False


def gradients(mode: str, *, autocast: bool) -> list[torch.Tensor]:
    """Forward within autocast, backward outside of it, as DeepSpeed's engine has them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "vocab_size": 64}
    torch.manual_seed(0)
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **sizes)).train()
    activation_checkpointing.enable(model, mode, {})
    ids = torch.randint(0, 64, (2, 16))
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("autocast", [True, False])
def test_what_is_recomputed_is_what_the_loss_was_computed_from(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `torch_autocast` blocks were computed again in fp32, and their gradients were others."""
    monkeypatch.setattr(activation_checkpointing.deepspeed.checkpointing, "configure", lambda *_, **__: None)  # wants ranks
    plain, full = gradients("none", autocast=autocast), gradients("full", autocast=autocast)
    assert len(plain) == len(full) > 10 and all(map(torch.equal, plain, full))
    other = gradients("none", autocast=not autocast)
    assert not any(map(torch.equal, plain, other)), "autocast made no difference"
