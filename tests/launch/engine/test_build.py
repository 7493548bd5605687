"""What goes into the engine: the model's weights, its parameter groups."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.engine import build
from launch.engine.strategy import Strategy
from model import MoEGPTConfig, MoEGPTForCausalLM

SIZES = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def small_model(**changes: object) -> MoEGPTForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "vocab_size": 64, "qk_norm": True}
    return MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**sizes, **changes}))


def test_only_matrices_decay() -> None:
    model = small_model()
    groups = build.parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert kept == {name for name in names.values() if "norm" in name or name.endswith("sinks")}
    assert any(name.endswith("sinks") for name in kept) and any("q_norm" in name for name in kept)


def test_what_is_frozen_is_in_no_group() -> None:
    """Under ZeRO weight decay would move it: in a partition there is no parameter without a gradient."""
    model = small_model()
    frozen = [model.model.embed_tokens.weight.requires_grad_(False), model.model.norm.weight.requires_grad_(False)]
    trained = [parameter for group in build.parameter_groups(model, 0.01) for parameter in group["params"]]
    assert len(trained) == len(list(model.parameters())) - 2
    assert not {id(parameter) for parameter in frozen} & {id(parameter) for parameter in trained}


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(999)  # whatever was drawn before
        torch.rand(seed + 3)
        model = build.build_model(small_model().config, seed=seed, attn_implementation="sdpa")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flash"])
def test_attention_is_computed_as_was_asked_for(kind: str) -> None:
    assert build.build_model(small_model().config, seed=1, attn_implementation=kind).config._attn_implementation == kind


def test_one_chosen_group_is_warned_of() -> None:
    assert "topk_group 1" in str(build.group_hint(MoEGPTConfig.preset("tiny", n_group=2, topk_group=1)))
    for known in ({"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1, "norm_topk_prob": False}, {}):
        assert build.group_hint(MoEGPTConfig.preset("tiny", **known)) is None


@pytest.fixture
def engine_of_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build_engine` around an engine that is not there."""

    def made(**_: Any) -> tuple[Any, ...]:
        autocast = {"torch_autocast_enabled": lambda: True, "torch_autocast_dtype": lambda: torch.bfloat16}
        return SimpleNamespace(module=model, optimizer=None, device=torch.device("cpu"), **autocast), None, None, None

    model = small_model()
    monkeypatch.setattr(build.passes, "keep_freed_memory", lambda: None)  # which is for a process's life
    monkeypatch.setattr(build.deepspeed, "initialize", made)
    return lambda **settings: build.build_engine(model, {**SIZES, **settings})


def test_an_engine_without_our_layers_is_refused(engine_of_parts: Any) -> None:
    """It would train, without expert parallelism or balance."""
    with pytest.raises(RuntimeError, match="AutoEP swapped 0 of 2 MoE layers"):
        engine_of_parts()


@pytest.mark.parametrize(
    ("settings", "done"),
    [
        ({}, []),
        ({"compile": {"autoep_non_moe": True}}, ["compiled in torch.bfloat16"]),
        ({"zero_optimization": {"stage": 2}}, []),
        ({"zero_optimization": {"stage": 3}}, ["registered"]),
    ],
)
def test_what_the_json_asks_for_is_done_to_the_engine(
    settings: dict[str, Any], done: list[str], engine_of_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(build.expert_parallel, "check_swapped", lambda *_: None)
    monkeypatch.setattr(build.expert_parallel, "register_router_weights", lambda _: found.append("registered"))
    monkeypatch.setattr(build, "compile_regions", lambda _: found.append(f"compiled in {torch.get_autocast_dtype('cpu')}"))
    engine_of_parts(**settings)
    assert found == done


@pytest.mark.parametrize(("stage", "clips"), [(0, 0.0), (1, 0.5), (3, 0.5)])
def test_deepspeed_gets_a_copy_without_what_is_done_here(stage: int, clips: float) -> None:
    """Without ZeRO the StepHook clips; the caller's own still says how, and what is recomputed."""
    sections = {"zero_optimization": {"stage": stage}, "activation_checkpointing": {"mode": "full", "profile": True}}
    ours: dict[str, Any] = {**SIZES, "gradient_clipping": 0.5, **sections}
    before = copy.deepcopy(ours)
    theirs = build.without_our_keys(ours, Strategy.of(ours))
    assert ours == before
    assert theirs == {**before, "gradient_clipping": clips, "activation_checkpointing": {"profile": True}}
