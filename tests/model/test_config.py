"""Presets, aliases, refusals."""

import json
from pathlib import Path

import pytest

from model import MoEGPTConfig

# What the README says: total and active parameters, as written there.


def test_aliases_of_the_first_description() -> None:
    config = MoEGPTConfig(hidden_dim=128, num_attn_heads=4, num_key_value_heads=2, num_experts=4, context_length=512)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (128, 4, 32)
    assert (config.n_routed_experts, config.max_position_embeddings) == (4, 512)
    assert config.hidden_dim == 128 and config.num_local_experts == 4
    assert config.rope_parameters["original_max_position_embeddings"] == 512
    assert MoEGPTConfig.preset("tiny", num_experts=4, n_group=2, topk_group=1).n_routed_experts == 4


def test_it_survives_json(tmp_path: Path) -> None:
    config = MoEGPTConfig.preset("tiny", qk_norm=True, z_loss_weight=1e-4, eos_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = MoEGPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moe_gpt"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": "64", "head_dim": 0}, "hidden_size must be a whole number of at least 1, got '64'"),
        ({"max_position_embeddings": "2048"}, "max_position_embeddings must be a whole number of at least 1, got '2048'"),
        ({"num_attention_heads": 0, "head_dim": 0}, "num_attention_heads must be a whole number of at least 1, got 0"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false, got 'false'"),
        ({"use_cache": "false"}, "use_cache must be true or false, got 'false'"),
        ({"output_attentions": "false"}, "output_attentions must be true or false, got 'false'"),
        ({"attention_sinks": None}, "attention_sinks must be true or false, got None"),
        ({"qk_norm": 0}, "qk_norm must be true or false, got 0"),
        ({"expert_dropout": "0.1"}, "expert_dropout must be at least 0 and below 1, got '0.1'"),
        ({"router_bias_decay": None}, "router_bias_decay must be at least 0 and at most 1, got None"),
        ({"z_loss_weight": -0.1}, "z_loss_weight must be at least 0 and below 1, got -0.1"),
        ({"router_bias_rate": 1.0}, "router_bias_rate must be at least 0 and below 1"),
        ({"router_aux_loss_coef": 1.0}, "router_aux_loss_coef must be at least 0 and below 1"),
        ({"router_bias_decay": 1.5}, "router_bias_decay must be at least 0 and at most 1, got 1.5"),
        ({"embedding_initializer_range": -1.0}, "embedding_initializer_range must be a finite number"),
        ({"router_initializer_range": float("inf")}, "router_initializer_range must be a finite number"),
        ({"initializer_range": -0.02}, "initializer_range must be a finite number"),
        ({"n_group": 0}, "n_group must be a whole number of at least 1, got 0"),
        ({"pad_token_id": "0"}, "pad_token_id must be the number of a token, got '0'"),
        ({"bos_token_id": [1]}, r"bos_token_id must be the number of a token, got \[1\]"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be the number of a token"),
        ({"rope_parameters": {"factor": 4.0, "attention_factor": 0}}, "attention_factor must be a finite number above 0"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"n_group": 3}, "must divide n_routed_experts"),
        ({"n_group": 8, "topk_group": 4}, "groups of 2 or more"),
        ({"topk_group": 5}, "must not exceed n_group"),
        ({"num_experts_per_tok": 5}, "must not exceed the 4 experts in the 2 chosen of 4 groups"),
        ({"scoring_func": "relu"}, "scoring_func must be one of sigmoid, softmax, got 'relu'"),
        ({"expert_dropout": 1.0}, "expert_dropout must be at least 0 and below 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type must be one of default, yarn"),
        ({"rope_parameters": {"factor": 0.5}}, "factor must be a finite number of at least 1"),
        ({"rope_parameters": {"factor": "two"}}, "rope_parameters.factor must be a finite number of at least 1, got 'two'"),
        ({"rope_parameters": {"rope_theta": 1, "factor": 2.0}}, "rope_theta must be above 1 for YaRN"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be at most"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be a finite number"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"factor": 1e300}}, "original_max_position_embeddings must be a finite number"),
        ({"rope_parameters": {"beta_fast": 0}}, "beta_fast must be a finite number above 0"),
        ({"rope_parameters": {"beta_fast": 1.0, "beta_slow": 32.0}}, "beta_fast must not be below beta_slow"),
        ({"rope_parameters": {"beta_slow": 64.0}}, "beta_fast must not be below beta_slow"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_type must be one of default, yarn, got 'linear'"),
        ({"rope_parameters": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}}, "give the attention_factor"),
        ({"rope_parameters": {"factor": 4.0, "truncate": False}}, "truncate must be True"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        ({"eos_token_id": "x"}, "eos_token_id must be the number of a token"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder must be false"),
        ({"hiden_size": 5}, "unknown model configuration field 'hiden_size'"),
    ],
)
def test_wrong_values_are_named(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoEGPTConfig.preset("tiny", **fields)


def test_values_at_the_ends_are_taken() -> None:
    yarn = {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 0.9}
    config = MoEGPTConfig.preset("tiny", router_bias_decay=1.0, eos_token_id=[1, 2], head_dim=None, rope_parameters=yarn)
    assert (config.router_bias_decay, config.eos_token_id, config.head_dim) == (1.0, [1, 2], 64)
    assert config.rope_parameters["attention_factor"] == 0.9
    assert MoEGPTConfig(max_position_embeddings=800, rope_parameters={"factor": 4.0}).rope_parameters == {
        **MoEGPTConfig().rope_parameters, "factor": 4.0, "original_max_position_embeddings": 200
    }  # fmt: skip


def test_unknown_preset_names_the_presets() -> None:
    with pytest.raises(ValueError, match="unknown preset '3b'; the presets are 4b, 60m, 800m, tiny"):
        MoEGPTConfig.preset("3b")


def test_older_names_of_rope_are_read() -> None:
    """`rope_theta` beside `rope_parameters` was an attribute that nothing read, and `type` a key."""
    assert MoEGPTConfig(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert MoEGPTConfig(rope_theta=5e5, rope_parameters={"rope_theta": 1e6}).rope_parameters["rope_theta"] == 1e6
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # of Qwen's model cards
    older, kept = MoEGPTConfig(rope_theta=1e6, rope_scaling=yarn), dict(yarn)
    today = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert older.rope_parameters == MoEGPTConfig(rope_parameters=today).rope_parameters and yarn == kept
    both = MoEGPTConfig(rope_theta=1e6, rope_scaling=yarn, rope_parameters={"rope_type": "default"})
    assert both.rope_parameters == older.rope_parameters
    assert MoEGPTConfig(rope_theta=1e6, rope_scaling=None).rope_parameters["rope_theta"] == 1e6
    plain = MoEGPTConfig(rope_parameters={"type": "default", "rope_theta": 500.0})
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def test_what_is_null_of_rope_has_its_default() -> None:
    given = dict.fromkeys(("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"))
    assert MoEGPTConfig(rope_parameters=given).rope_parameters == MoEGPTConfig().rope_parameters
    plain = {"rope_type": "default", "rope_theta": None, "factor": None}
    assert MoEGPTConfig(rope_parameters=plain).rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_rope_factor() -> None:
    config = MoEGPTConfig.preset("800m")
    longer = config.with_rope_factor(4)
    assert longer.max_position_embeddings == 8192 and config.max_position_embeddings == 2048
    assert longer.rope_parameters["factor"] == 4.0
    assert longer.rope_parameters["original_max_position_embeddings"] == 2048
    assert longer.with_rope_factor(4).to_dict() == longer.to_dict()
    assert longer.with_rope_factor(1).rope_parameters == config.rope_parameters
    assert MoEGPTConfig.preset("tiny").with_rope_factor(4).max_position_embeddings == 2048
    plain = MoEGPTConfig(max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert plain.with_rope_factor(4).rope_parameters == {
        **config.rope_parameters, "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 512
    }  # fmt: skip
    with pytest.raises(ValueError, match="at least 1"):
        config.with_rope_factor(0.5)
