"""A config.json that is read without transformers says what `MoEGPTConfig` makes of it; what nobody would read is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import Glm4MoeConfig

from model import MoEGPTConfig
from model.accounting import count_parameters, training_flops_per_token
from model.config import PRESETS, RopeParameters
from model.config_json import OTHER_FIELDS, ROPE_FIELDS, check_fields, load_sizes
from model.sizes import ALIASES, ModelSizes


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_read_alike(preset: str) -> None:
    config, sizes = MoEGPTConfig.preset(preset), load_sizes(preset)
    assert {f.name: getattr(sizes, f.name) for f in fields(sizes)} == {f.name: getattr(config, f.name) for f in fields(sizes)}
    assert count_parameters(sizes) == count_parameters(config)
    assert training_flops_per_token(sizes, 512) == training_flops_per_token(config, 512)


def test_defaults_aliases_and_a_saved_config(tmp_path: Path) -> None:
    given = {"hidden_dim": 96, "num_attn_heads": 6, "num_experts": 4, "context_length": 128, "use_qk_norm": False}
    config = MoEGPTConfig(**given, num_key_value_heads=3, tie_word_embeddings=True, attention_sinks=False)
    config.save_pretrained(tmp_path)
    (tmp_path / "aliases.json").write_text(
        json.dumps({**given, "num_key_value_heads": 3, "tie_word_embeddings": True, "attention_sinks": False, "head_dim": None})
    )
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "aliases.json"):
        sizes = load_sizes(str(path))
        assert sizes.head_dim == 16 and sizes.n_routed_experts == 4
        assert all(getattr(sizes, f.name) == getattr(config, f.name) for f in fields(sizes))
    assert {k: v for k, v in MoEGPTConfig.attribute_map.items() if k != v} == ALIASES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"hidden_size": 0}', "hidden_size must be a whole number of at least 1, got 0"),
        ('{"hidden_size": "wide"}', "hidden_size must be a whole number of at least 1, got 'wide'"),
        ('{"hidden_size": true}', "hidden_size must be a whole number of at least 1, got True"),
        ('{"head_dim": -1}', "head_dim must be a whole number of at least 0, got -1"),
        ('{"qk_norm": 1}', "qk_norm must be true or false, got 1"),
        ('{"num_experts_per_tok": 9}', "num_experts_per_tok (9) must not exceed n_routed_experts (8)"),
        ("[1]", "the top level must be an object"),
        ('{"num_hiden_layers": 2}', "num_hiden_layers is not a field of the model; did you mean num_hidden_layers?"),
        ('{"hidden_size": 64, "n_layer": 2}', "n_layer is not a field of the model"),
        ('{"rope_parameters": {"facter": 4}}', "facter is not a field of rope_parameters; did you mean factor?"),
        ('{"rope_scaling": {"facter": 4}}', "facter is not a field of rope_scaling; did you mean factor?"),
        ('{"model_type": "llama", "hidden_size": 64}', "model_type must be moe_gpt or glm4_moe, not 'llama'"),
        ('{"model": {"hidden_size": 64}, "deepspeed": {}}', "this is a run's config.json"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_mistakes_name_the_file_and_the_field(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        load_sizes(str(tmp_path / "config.json"))
    assert said in str(refused.value)


def test_every_field_of_a_configuration_is_known() -> None:
    """What transformers' newest or oldest supported version writes as well: it would be refused otherwise."""
    config = MoEGPTConfig.preset("tiny")
    written = {field.name for field in fields(MoEGPTConfig)} | config.to_dict().keys() | config.to_diff_dict().keys()
    assert OTHER_FIELDS.isdisjoint(field.name for field in fields(ModelSizes))
    assert {name for name in written if not name.startswith("_")} <= OTHER_FIELDS | {field.name for field in fields(ModelSizes)}
    check_fields({**dict.fromkeys(OTHER_FIELDS), **dict.fromkeys(ALIASES), "model_type": "moe_gpt", "_comment": "mine"})
    check_fields(Glm4MoeConfig().to_dict())
    check_fields({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}})  # as before transformers 5
    assert (config.rope_parameters or {}).keys() <= ROPE_FIELDS >= RopeParameters.__annotations__.keys()


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"--model 7b is neither a preset \(4b, 60m, 800m, tiny\) nor a config.json"):
        load_sizes("7b")
