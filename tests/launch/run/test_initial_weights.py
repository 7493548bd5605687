"""`--init_from`: every weight of an exported folder, bit for bit, or a sentence with the one that is not right."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.manifest import record_all, write_manifest
from launch.run.initial_weights import load_weights
from model import MoEGPTConfig, MoEGPTForCausalLM


def small(**changes: Any) -> MoEGPTForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "vocab_size": 64}
    return MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**sizes, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    small().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    [file] = [path for path in folder.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(file)
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, file)


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_the_exported_one(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    source = small(tie_word_embeddings=tied)
    source.save_pretrained(tmp_path)
    torch.manual_seed(2)
    model = small(tie_word_embeddings=tied)
    where = model.lm_head.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, source.lm_head.weight)
    load_weights(model, tmp_path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.lm_head.weight.data_ptr() == where, "in place: no second copy of the model"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("model.norm.weight", None, "has no model.norm.weight"),
        ("model.norm.weight", torch.zeros(3), r"model.norm.weight is \(3,\), the model wants \(32,\)"),
        ("model.norm.weight", torch.full((32,), math.nan), "model.norm.weight holds numbers that are not finite"),
    ],
)
def test_what_is_not_right_is_named(folder: Path, name: str, value: torch.Tensor | None, sentence: str) -> None:
    change(folder, name, value)
    with pytest.raises(ValueError, match=sentence):
        load_weights(small(), folder)


@pytest.mark.parametrize(
    "lacks", [None, "model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"]
)
def test_a_stock_folder_has_each_expert_by_itself(lacks: str | None, tmp_path: Path) -> None:
    """One of them that is missing would stay as it was drawn: seven eighths of a layer's experts are no layer."""
    torch.manual_seed(1)
    source, parts = small(), {}
    source.save_pretrained(tmp_path)
    for name, value in source.state_dict().items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in value):
                parts |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif last == "down_proj":
            parts |= {f"{stem}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(value)}
        else:
            parts[name] = value
    if lacks is not None:
        parts.pop(lacks)
    save_file({name: value.clone() for name, value in parts.items()}, tmp_path / "model.safetensors")
    torch.manual_seed(2)
    model = small()
    if lacks is None:
        load_weights(model, tmp_path)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())
        return
    stacked = lacks.partition("experts.")[0] + ("experts.down_proj" if "down" in lacks else "experts.gate_up_proj")
    with pytest.raises(ValueError, match=rf"has not all of {stacked} \(1 weights are missing\)"):
        load_weights(model, tmp_path)


def test_another_size_and_damage_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the model"):
        load_weights(small(hidden_size=64), folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(small(), folder)
    with pytest.raises(ValueError, match="is not an exported model"):
        load_weights(small(), tmp_path / "nothing")


def test_an_export_that_is_not_what_was_written_is_refused(folder: Path) -> None:
    """A hole in a file reads as zeros, which are finite and fit: training began from them."""
    path = min(folder.glob("*.safetensors"))
    write_manifest(folder, record_all(folder), kind="export")
    load_weights(small(), folder)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)
    with pytest.raises(ValueError, match="is damaged: it is not the file that was exported"):
        load_weights(small(), folder)
