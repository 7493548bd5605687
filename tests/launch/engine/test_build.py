"""What goes into the engine: the model's weights, its parameter groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launch.engine import build
from model import MoEGPTConfig, MoEGPTForCausalLM


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


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(999)  # whatever was drawn before
        torch.rand(seed + 3)
        model = build.build_model(small_model().config, seed=seed, attn_implementation="sdpa")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_one_chosen_group_is_warned_of() -> None:
    assert "topk_group 1" in str(build.group_hint(MoEGPTConfig.preset("tiny", n_group=2, topk_group=1)))
    for known in ({"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1, "norm_topk_prob": False}, {}):
        assert build.group_hint(MoEGPTConfig.preset("tiny", **known)) is None


def test_an_engine_without_our_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train, without expert parallelism or balance."""
    model = small_model()
    engine = SimpleNamespace(module=model, optimizer=None)
    monkeypatch.setattr(build.passes, "before_engine", lambda: None)  # which is for a process's life
    monkeypatch.setattr(build.deepspeed, "initialize", lambda **_: (engine, None, None, None))
    settings = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(RuntimeError, match="AutoEP swapped 0 of 2 MoE layers"):
        build.build_engine(model, settings)
