"""A `config.json` of anybody: the same refusal by training's `--model` and by every command that reads an exported folder."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4MoeConfig

from data.cli import UserError
from launch.engine import hardware
from launch.engine.build import check_room
from launch.exported.model import own_config
from launch.exporting.formats import exported_config
from launch.model_config import load_model_config
from model import MoEGPTConfig
from model.accounting import count_parameters
from model.config_json import load_sizes
from model.sizes import ModelSizes

HOSTILE: list[dict[str, Any]] = [
    *({"num_labels": 10**9}, {"num_labels": 10**8}, {"num_labels": "x"}, {"num_labels": 2.5}),
    *({"id2label": 5}, {"id2label": {"a": "b"}}, {"num_hidden_layers": 10**7}, {"num_hidden_layers": "7"}),
    *({"rope_parameters": "x"}, {"rope_parameters": {"factor": "x"}}, {"rope_parameters": {"factor": [1]}}),
    *({"rope_parameters": {"factor": 1e300}}, {"expert_dropout": "x"}, {"z_loss_weight": None}, {"router_bias_rate": [1]}),
    *({"scoring_func": [1]}, {"router_balance": {}}, {"hidden_act": 5}, {"model_type": "evil"}, {"model_type": 5}),
    *({"vocab_size": 512.5}, {"rms_norm_eps": 10**400}, {"eos_token_id": "x"}, {"is_encoder_decoder": True}),
]
NESTED, LARGE = b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b'{"x":"' + b"y" * (1 << 24) + b'"}'
CONTENT = [b"[" * 10**6, NESTED, LARGE, b"[1]", b"", b"\xff\xfe\x00{", b"5"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    MoEGPTConfig.preset("tiny").save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_a_config_file_or_a_preset(tmp_path: Path) -> None:
    MoEGPTConfig.preset("tiny", hidden_size=64).save_pretrained(tmp_path)
    assert load_model_config(str(tmp_path / "config.json")).hidden_size == 64
    assert load_model_config("800m").hidden_size == 1536
    (tmp_path / "misspelt.json").write_text('{"num_hiden_layers": 2}')
    with pytest.raises(
        UserError, match=r"misspelt\.json: num_hiden_layers is not a field of the model; did you mean num_hidden_layers"
    ):
        load_model_config(str(tmp_path / "misspelt.json"))
    with pytest.raises(FileNotFoundError, match="is neither a preset"):
        load_model_config(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"--model 7b is neither a preset \(4b, 60m, 800m, tiny\) nor a config.json"):
        load_model_config("7b")


def refused_by_both(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: load_model_config(str(path)), lambda: own_config(path.parent)):
        with pytest.raises(UserError, match=r"config\.json"):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB: a name for each of 1e9 labels has 100 GB


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: str(change)[:50])
def test_a_value_without_sense(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused_by_both(path)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "64"}, {"rope_parameters": [1]}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}}],
)
def test_a_value_of_another_kind_in_a_stock_folder(path: Path, change: dict[str, Any]) -> None:
    """Whose fields transformers checks as they are set, with an error that is no ValueError."""
    path.write_text(json.dumps({**Glm4MoeConfig(first_k_dense_replace=0).to_dict(), **change}))
    refused_by_both(path)


@pytest.mark.parametrize("content", CONTENT, ids=lambda content: str(content[:8]))
def test_what_is_no_configuration(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused_by_both(path)


def test_another_model_is_not_read_as_ours(path: Path) -> None:
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(UserError, match=r"config\.json: model_type must be moe_gpt or glm4_moe"):
        load_model_config(str(path))
    assert own_config(path.parent) is None


@pytest.mark.parametrize("change", [{"hidden_size": 2**40}, {"n_routed_experts": 10**9}, {"hidden_size": 2**70, "head_dim": 64}])
def test_a_model_beyond_the_memory_is_refused_before_it_is_built(change: dict[str, int]) -> None:
    """It was torch's error of an allocation, or 20 s of a growing process."""
    with pytest.raises(UserError, match=r"[\d,]+ parameters, and each rank builds it in fp32, .* GB, and its device has"):
        check_room(MoEGPTConfig.preset("tiny", **change), 1)
    check_room(MoEGPTConfig.preset("60m"), 1)


def test_a_rank_has_room_for_its_own_experts_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEGPTConfig.preset("tiny")
    count = count_parameters(config)
    room = 4 * (count.total + count.routed_experts // 2)  # all of it may be filled
    monkeypatch.setattr(hardware, "memory", lambda: room)
    check_room(config, 2)
    with pytest.raises(UserError, match="and its device has"):
        check_room(config, 1)


@pytest.mark.parametrize(("format", "sinks"), [("moe_gpt", True), ("glm4_moe", False)])
def test_an_exported_folder_says_what_model_to_train_on(format: str, sinks: bool, tmp_path: Path) -> None:
    """`--model hf/config.json --init_from hf`: Glm4Moe's own fields in it were no fields of the model."""
    config = MoEGPTConfig.preset("tiny", attention_sinks=sinks, hidden_size=128)
    exported_config(config, format).save_pretrained(tmp_path)
    for named in (tmp_path, tmp_path / "config.json"):
        assert load_sizes(str(named)) == ModelSizes.of(
            {**config.to_dict(), "attention_sinks": True}
        )  # a stock one has no such field
        assert count_parameters(load_model_config(str(named))) == count_parameters(config)


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"first_k_dense_replace": 1}, {"num_mtp_layers": 1}], ids=str)
def test_what_only_glm4_moe_can_be_is_no_model_of_ours(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"config\.json: {next(iter(change))} must be .*: this model has nothing else"):
        load_model_config(str(path))
