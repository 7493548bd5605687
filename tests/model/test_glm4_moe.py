"""Configurations of Glm4Moe and of this model, one into the other."""

from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig

from model import MoEGPTConfig
from model.glm4_moe import expert_name, expert_place, from_glm4_moe, to_glm4_moe

STOCK = {"first_k_dense_replace": 0, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}


def test_there_and_back() -> None:
    config = MoEGPTConfig.preset("tiny", attention_sinks=False, head_dim=32, routed_scaling_factor=2.5, norm_topk_prob=False)
    stock = to_glm4_moe(config)
    back = from_glm4_moe(stock.to_dict())
    training_only = {"transformers_version", "expert_dropout", "z_loss_weight", "embedding_initializer_range"}
    training_only |= {"router_balance", "router_bias_rate", "router_bias_decay", "router_bias_average", "router_aux_loss_coef"}
    for name, value in config.to_dict().items():
        if name not in training_only:
            assert getattr(back, name) == value, name
    assert stock.to_dict()["head_dim"] == 32 and stock.use_qk_norm


def test_what_glm4_moe_lacks_is_said() -> None:
    with pytest.raises(ValueError, match="attention sinks"):
        to_glm4_moe(MoEGPTConfig.preset("tiny"))
    with pytest.raises(ValueError, match="by sigmoid, this model by softmax"):
        to_glm4_moe(MoEGPTConfig.preset("tiny", attention_sinks=False, scoring_func="softmax"))
    dense = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    with pytest.raises(ValueError, match="two best experts of a group, and this model has one"):
        to_glm4_moe(MoEGPTConfig.preset("tiny", attention_sinks=False, **dense))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({}, "partial_rotary_factor must be 1.0, got 0.5"),  # Glm4Moe's default
        ({"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 1.0}}, "rope_type"),
    ],
)
def test_what_this_model_lacks_is_said(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_glm4_moe({**STOCK, **fields})


def test_defaults_are_glm4_moes() -> None:
    """A field that config.json leaves out means what transformers takes it for."""
    config = from_glm4_moe({**STOCK, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}})
    assert not config.attention_sinks and not config.qk_norm
    assert (config.vocab_size, config.rms_norm_eps) == (Glm4MoeConfig().vocab_size, Glm4MoeConfig().rms_norm_eps)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_an_experts_matrices_have_their_places() -> None:
    state = {
        "a.mlp.experts.gate_up_proj": torch.arange(24.0).view(2, 4, 3),
        "a.mlp.experts.down_proj": torch.arange(12.0).view(2, 3, 2),
    }
    for part, expected in (
        ("gate", state["a.mlp.experts.gate_up_proj"][1, :2]),
        ("up", state["a.mlp.experts.gate_up_proj"][1, 2:]),
    ):
        place = expert_place(state, f"a.mlp.experts.1.{part}_proj.weight")
        assert place is not None and torch.equal(place, expected)
    down = expert_place(state, "a.mlp.experts.0.down_proj.weight")
    assert down is not None and down.data_ptr() == state["a.mlp.experts.down_proj"].data_ptr()  # a view
    for name in ("a.mlp.experts.2.up_proj.weight", "b.mlp.experts.0.up_proj.weight", "a.mlp.gate.weight"):
        assert expert_place(state, name) is None
    assert expert_name("a.mlp.experts.1.up_proj.weight") == "a.mlp.experts.gate_up_proj" and expert_name("x") == "x"
