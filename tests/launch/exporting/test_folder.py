"""An export is read back before it gets its name: what reads otherwise than it was written is no export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data.cli import UserError
from launch.exporting import folder
from launch.exporting.formats import build, exported_config
from launch.exporting.source import model_config, weights

OLD = Path(__file__).resolve().parents[2] / "fixtures" / "before_the_move"
WEIGHT, BIAS = "model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("name", [None, WEIGHT, BIAS])
def test_one_number_that_reads_otherwise_leaves_no_export(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last bit of one number in the file; without that the same export succeeds."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    checkpoint, output = tmp_path / "run/checkpoints/step_6", tmp_path / "out" / "hf"
    model = build(exported_config(model_config(checkpoint), "moe_gpt"), weights(checkpoint), "bfloat16")
    save = folder._save

    def save_otherwise(model: Any, checkpoint: Path, working: Path, max_shard_size: str) -> None:
        save(model, checkpoint, working, max_shard_size)
        if name is not None:
            [file] = working.glob("*.safetensors")
            tensors = load_file(file)
            flat = tensors[name].view(-1).view(torch.int16 if tensors[name].element_size() == 2 else torch.int32)
            flat[-1] ^= 1
            save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(folder, "_save", save_otherwise)
    if name is None:
        folder.write(model, checkpoint, output, max_shard_size="1GB")
        assert (output / "manifest.json").is_file()
        drawn = json.loads((output / "generation_config.json").read_text())
        end = model.config.eos_token_id
        expected = {"temperature": 0.2, "top_p": 0.95, "top_k": 0, "eos_token_id": end, "pad_token_id": end, "do_sample": True}
        assert drawn.items() >= expected.items() and end is not None
        return
    with pytest.raises(UserError, match=rf"{name} reads back otherwise than it was written"):
        folder.write(model, checkpoint, output, max_shard_size="1GB")
    assert not list(output.parent.iterdir())


def test_a_closed_folder_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said once all weights were verified, read and about to be written."""
    monkeypatch.setattr(folder.os, "access", lambda path, _: Path(path) != tmp_path)
    (tmp_path / "open").mkdir()
    folder.check_output(tmp_path / "open" / "hf")
    for output in (tmp_path / "hf", tmp_path / "new" / "hf"):
        with pytest.raises(PermissionError, match="may not be written to"):
            folder.check_output(output)


def test_an_older_runs_tokenizer_is_completed(tmp_path: Path) -> None:
    """Its folder names no padding, without which transformers makes no batch of prompts."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert "pad_token" not in settings
    (tmp_path / "hf").mkdir()
    folder._copy_tokenizer(tmp_path / "run" / "checkpoints" / "step_6", tmp_path / "hf")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert found(["a", "a = b"], padding=True).attention_mask[0][0] == 0
    assert json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize("size", ["5X", "5", "", "GB", "-"])
def test_a_size_that_is_none_is_said_before_anything_is_read(size: str) -> None:
    with pytest.raises(UserError, match=r"--max_shard_size .* must be a size such as 5GB"):
        folder.check_shard_size(size)
    folder.check_shard_size("500MB")
