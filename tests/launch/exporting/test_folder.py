"""An export is read back before it gets its name: what reads otherwise than it was written is no export."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.trainer_utils import align_special_tokens

from data.cli import NotFound, UserError
from data.tokens import tokenizer as tokenizers
from data.tokens.folder import TokenizerFiles
from launch.checkpoint.publish import discard, working_name
from launch.export import main
from launch.exporting import folder, formats, source
from launch.exporting.formats import build, exported_config
from launch.exporting.source import model_config, weights
from model import MoEGPTConfig, MoEGPTForCausalLM

WEIGHT, BIAS = "model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("name", [None, WEIGHT, BIAS])
def test_one_number_that_reads_otherwise_leaves_no_export(
    name: str | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last bit of one number in the file; without that the same export succeeds."""
    output = tmp_path / "out" / "hf"
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
        expected = {"temperature": 0.2, "top_p": 0.95, "top_k": 0, "eos_token_id": end, "pad_token_id": 4, "do_sample": True}
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


def test_an_older_runs_tokenizer_is_completed(checkpoint: Path, tmp_path: Path) -> None:
    """Its folder names no padding, without which transformers makes no batch of prompts."""
    settings = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert "pad_token" not in settings
    (tmp_path / "hf").mkdir()
    folder._copy_tokenizer(checkpoint, tmp_path / "hf")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert found(["a", "a = b"], padding=True).attention_mask[0][0] == 0
    assert json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize("size", ["5X", "5", "", "GB", "-"])
def test_a_size_that_is_none_is_said_before_anything_is_read(size: str) -> None:
    with pytest.raises(UserError, match=r"--max_shard_size .* must be a size such as 5GB"):
        folder.check_shard_size(size)
    folder.check_shard_size("500MB")


def export(checkpoint: Path, output: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.export.make_quiet", lambda: None)  # it would silence the tests that follow
        main(["--checkpoint", str(checkpoint), "--output", str(output), *flags])


def test_a_second_export_of_one_name_is_refused_while_the_first_writes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second deleted what the first was writing. Another name beside it is free."""
    output, save, said = tmp_path / "out" / "hf", folder._save, []

    def save_with_another_beside(model: Any, checkpoint: Path, working: Path, max_shard_size: str) -> None:
        monkeypatch.setattr(folder, "_save", save)
        with pytest.raises(UserError, match=rf"another export writes {output} \(process \d+ on .*\); wait for it") as refused:
            export(checkpoint, output)
        said.append(str(refused.value))
        working.mkdir()
        export(checkpoint, output.with_name("f"))
        save(model, checkpoint, working, max_shard_size)

    monkeypatch.setattr(folder, "_save", save_with_another_beside)
    export(checkpoint, output)
    assert said and sorted(path.name for path in output.parent.iterdir()) == ["f", "hf"]
    export(checkpoint, output)


def test_what_another_name_is_written_under_is_no_leftover(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "hf"
    output.parent.mkdir()
    living = [working_name(output.with_name(name), "tmp") for name in ("run-hf-final", "hf-final", "a-hf", ".hf")]
    dead = [working_name(output, kind) for kind in ("tmp", "trash", "replaced")]
    dead.append(working_name(dead[0], "trash"))
    for path in (*living, *dead):
        path.mkdir()
    export(checkpoint, output)
    assert set(output.parent.iterdir()) == {output, *living}


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """transformers copies a folder's code into the user's home and imports it from there: here from another place, and anew."""
    modules = tmp_path_factory.mktemp("modules")

    def forget() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "transformers_modules"}

    before = forget()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
        patched.setattr(sys, "path", [str(modules), *sys.path])
        yield modules
    forget()
    sys.modules.update(before)


@pytest.mark.parametrize(("kind", "padding"), [("moe_gpt", True), ("moe_gpt", False), ("glm4_moe", True)])
def test_special_tokens_are_the_same_in_all_files(
    kind: str, padding: bool, checkpoint: Path, tmp_path: Path, own_modules: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else transformers' Trainer warns and writes others back, and `generate` takes no mask from a batch that is padded.

    A padding that is the end of text stays out of the configuration, by which Glm4Moe's embedding would not train that row.
    """
    write_tokenizer(checkpoint.parents[1] / "tokenizer", padding)
    fields = {} if kind == "moe_gpt" else {"attention_sinks": False}
    trained = MoEGPTForCausalLM(MoEGPTConfig.from_dict({**model_config(checkpoint).to_dict(), **fields}))
    model = build(exported_config(trained.config, kind), trained.state_dict().items(), "float32")
    folder.write(model, checkpoint, tmp_path / "hf", max_shard_size="1GB")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (own_modules / "transformers_modules").is_dir()
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 0, 4 if padding else 0)
    for settings in (read.config, read.generation_config):
        found = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
        assert found == ids or (settings is read.config and not padding and found == (0, 0, None))
    assert read.get_input_embeddings().padding_idx == (4 if kind == "glm4_moe" else None)
    if padding:
        logging.getLogger("transformers").addHandler(caplog.handler)
        align_special_tokens(read, tokenizer)
        assert not caplog.records


@pytest.mark.parametrize("step", ["source.verify", "source.weights", "folder._compare"])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_one_sentence(
    step: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export while training goes on; it was said to be damaged, or a file to be missing."""
    module = {"source": source, "folder": folder}[step.partition(".")[0]]
    work = getattr(module, step.partition(".")[2])

    def deleted_before(*given: Any) -> Any:
        discard(checkpoint)
        return work(*given)

    monkeypatch.setattr(module, step.partition(".")[2], deleted_before)
    with pytest.raises(NotFound, match=r"step_6 was deleted while it was read: its run goes on .* run the same command again"):
        export(checkpoint, tmp_path / "out" / "hf")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_without_sinks_is_told_of_the_other_format(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose attention takes sdpa; moe_gpt's is eager whether a model has sinks or not."""
    tiny = [MoEGPTConfig.preset("tiny", attention_sinks=sinks) for sinks in (True, False)]
    softmax = MoEGPTConfig.preset("tiny", attention_sinks=False, scoring_func="softmax")
    assert [formats.fits_glm4_moe(config) for config in (*tiny, softmax)] == [False, True, False]
    export(checkpoint, tmp_path / "hf")
    assert "--format glm4_moe" not in capsys.readouterr().out
    monkeypatch.setattr(formats, "fits_glm4_moe", lambda config: True)
    export(checkpoint, tmp_path / "hf")
    assert "this model has no sinks: --format glm4_moe needs no code" in capsys.readouterr().out


def write_tokenizer(folder: Path, padding: bool) -> None:
    text = tokenizers.train(["def f(x): return x\n"], 320)
    if not padding:  # as of others, which have no tokens for filling in
        text = text.replace("<fim_pad>", "<other>")
    tokenizers.save(folder, text, tokenizers.facts("t", TokenizerFiles(text, None, "")))


def test_no_path_of_this_machine_is_in_an_export(checkpoint: Path, tmp_path: Path) -> None:
    """It may be uploaded, and paths name users and employers."""
    run = checkpoint.parents[1]
    about = json.loads((run / "config.json").read_text())
    about["command"] = [str(tmp_path / "train.py"), "--data", str(tmp_path / "python")]
    (run / "config.json").write_text(json.dumps(about))
    export(checkpoint, tmp_path / "hf")
    files = [path for path in (tmp_path / "hf").iterdir() if path.suffix != ".safetensors"]
    assert [path.name for path in files if str(tmp_path) in path.read_text()] == []
    written = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    assert (written["checkpoint"], written["step"]) == ("run/step_6", 6)


def test_an_output_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    """Behind the link of a disk that is not mounted its folders were made on the disk that is; `/` was a traceback."""
    (tmp_path / "hf").symlink_to(tmp_path / "disk" / "hf")
    with pytest.raises(UserError, match=r"hf is a link to .*disk/hf, which is not there"):
        folder.check_output(tmp_path / "hf")
    with pytest.raises(UserError, match="root of the file system"):
        folder.check_output(Path("/"))
