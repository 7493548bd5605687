"""From a checkpoint to a folder that transformers loads, in a fresh process outside the repository, with the same logits."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_at import in_child
from safetensors import safe_open
from support import ROOT
from tokenizers import Tokenizer, models
from training_process import launch_ranks
from transformers import PreTrainedTokenizerFast

from data.terminal import drain
from launch import manifest
from launch.checkpoint.publish import working_name
from launch.export import main
from launch.exporting.formats import exported_config, fill
from launch.exporting.hub.modeling_moe_gpt import MoEGPTForCausalLM
from launch.exporting.source import model_config, weights

RUNS = {
    "zero2-float32": {"stage": 2, "dtype": "float32"},
    "zero2-bfloat16": {"stage": 2, "dtype": "bfloat16"},
    "zero1-bfloat16": {"stage": 1, "dtype": "bfloat16"},
    "zero0-float32": {"stage": 0, "dtype": "float32"},
    "zero3-float32": {"stage": 3, "dtype": "float32"},
    "tied": {"stage": 2, "dtype": "float32", "tie_word_embeddings": True},
    "no-sinks": {"stage": 2, "dtype": "float32", "attention_sinks": False, "qk_norm": True, "head_dim": 6},
    "softmax": {"stage": 2, "dtype": "float32", "scoring_func": "softmax"},
}
EXPORTS = {  # name: (run, dtype, format)
    "zero2": ("zero2-float32", "float32", "moe_gpt"),
    "zero0": ("zero0-float32", "float32", "moe_gpt"),
    "zero3": ("zero3-float32", "float32", "moe_gpt"),
    "tied": ("tied", "float32", "moe_gpt"),
    "stock": ("no-sinks", "float32", "glm4_moe"),
    "plain": ("no-sinks", "float32", "moe_gpt"),
    "softmax": ("softmax", "float32", "moe_gpt"),
}
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
found = {}
for name, (folder, expected, trust) in json.loads(sys.argv[1]).items():
    expected = torch.load(expected)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
        base = AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=trust)(expected["ids"]).last_hidden_state
        difference = (torch.stack((logits, model.lm_head(base))) - expected["logits"]).abs().max().item()
    tokens = len(PreTrainedTokenizerFast.from_pretrained(folder))
    found[name] = [difference, str(model.dtype), tokens, type(model).__module__]
assert not any(name == "model" or name.startswith("model.") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launch_ranks(nursery, 2, "exportable", folder=folder, runs=RUNS, ep=2)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0")))
    for name in RUNS:
        words.save_pretrained(folder / name / "tokenizer")
    return folder


def export(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.export.make_quiet", lambda: None)  # it would silence the tests that follow
        main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def elsewhere(runs, tmp_path_factory):
    """What an interpreter outside the repository, that knows only transformers, makes of the exported folders."""
    folder = tmp_path_factory.mktemp("exports")
    asked = {}
    for name, (run, dtype, format) in EXPORTS.items():
        export("--checkpoint", runs / run, "--output", folder / name, "--dtype", dtype, "--format", format)
        asked[name] = [str(folder / name), str(runs / run / "expected.pt"), format == "moe_gpt"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(asked)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_the_router_bias_matters_here(runs):
    for name in RUNS:
        expected = torch.load(runs / name / "expected.pt")
        assert (expected["logits"] - expected["unbiased"]).abs().max() > 1e-3, "else a lost bias would go unseen"


@pytest.mark.parametrize("name", EXPORTS)
def test_fp32_logits_equal_the_engines(elsewhere, name):
    difference, dtype, tokens, module = elsewhere[name]
    assert difference < 1e-5  # of logits around 1
    assert (dtype, tokens) == ("torch.float32", 97)
    stock = EXPORTS[name][2] == "glm4_moe"
    assert module.startswith("transformers.models.glm4_moe" if stock else "transformers_modules.")


@pytest.mark.parametrize("name", ["zero2-bfloat16", "zero1-bfloat16"])
def test_bf16_export_is_the_masters_rounded_once(runs, name, tmp_path):
    """Which is what the engine computed with: the same bits."""
    out = tmp_path / "hf"
    export("--checkpoint", runs / name / "checkpoints" / "step_2", "--output", out)
    module = torch.load(runs / name / "checkpoints/step_2/mp_rank_00_model_states.pt", weights_only=True)["module"]
    with safe_open(out / "model.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    compared = 0
    for theirs, value in module.items():
        ours = theirs.replace("mlp.router.gate.weight", "mlp.gate.weight").replace("mlp.router.", "mlp.gate.")
        assert torch.equal(held[ours], value), ours
        assert held[ours].dtype == (torch.float32 if "bias" in ours else torch.bfloat16)
        compared += 1
    assert compared == len(module) > 20
    for layer in range(2):
        for expert in range(12):
            path = runs / name / f"checkpoints/step_2/layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            w1, w2, w3 = (torch.load(path, weights_only=True)[f"model.layers.{layer}.mlp.experts.w{i}.{expert}"] for i in (1, 2, 3))
            gate_up = held[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
            assert torch.equal(gate_up, torch.cat([w1, w3]))
            assert torch.equal(held[f"model.layers.{layer}.mlp.experts.down_proj"][expert], w2)


def refused(*arguments: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        export(*arguments)
    return str(caught.value)


def test_mistakes_are_one_sentence_and_touch_nothing(runs, tmp_path):
    run, out = runs / "zero2-float32", tmp_path / "hf"
    assert "attention sinks" in refused("--checkpoint", run, "--output", out, "--format", "glm4_moe")
    assert "it has step_2" in refused("--checkpoint", run, "--output", out, "--tag", "step_9")
    assert "is it a run's folder" in refused("--checkpoint", tmp_path, "--output", out)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").touch()
    assert "has saved none yet; see its --save_interval" in refused("--checkpoint", tmp_path / "young", "--output", out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "no earlier export" in refused("--checkpoint", run, "--output", out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damaged", ["layer_1_expert_11_mp_rank_00_model_states.pt", "buffers.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(runs, tmp_path, damaged):
    shutil.copytree(runs / "zero2-float32", tmp_path / "run")
    path = tmp_path / "run/checkpoints/step_2" / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert f"{damaged} is damaged" in refused("--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_command_says_its_sentence_and_exits_with_2(runs, tmp_path):
    """As a user starts it: by its path, from anywhere."""
    command = [sys.executable, ROOT / "launch/export.py", "--checkpoint", runs / "tied", "--output", "hf", "--tag", "step_7"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --checkpoint") and result.stderr.count("\n") == 1


def test_nobody_has_to_listen(runs, tmp_path, monkeypatch):
    """`export.py ... | head -1` had exported nothing, without a word."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        export("--checkpoint", runs / "zero2-float32", "--output", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()


def test_an_earlier_export_is_replaced_and_leftovers_go(runs, tmp_path, capsys):
    out = tmp_path / "hf"
    working_name(out, "tmp").mkdir()
    export("--checkpoint", runs / "zero2-float32", "--output", out, "--tag", "best")
    (out / "config.json").unlink()
    out.rename(tmp_path / "disk")
    out.symlink_to("disk")  # which stays
    export("--checkpoint", runs / "zero2-float32", "--output", out, "--dtype", "float32", "--max_shard_size", "20KB")
    drain()
    assert "exported step_2 as moe_gpt in float32" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "hf"] and out.readlink() == Path("disk")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {p.stat().st_mode for p in shards} == {(out / "config.json").stat().st_mode}


@pytest.mark.parametrize("change", ["drop", "twice", "shape", "unknown"])
def test_every_weight_must_come_exactly_once_in_its_shape(runs, change):
    checkpoint = runs / "zero2-float32/checkpoints/step_2"
    with torch.device("meta"):
        model = MoEGPTForCausalLM(exported_config(model_config(checkpoint), "moe_gpt"))
    held = dict(weights(checkpoint))
    name = "model.layers.1.mlp.experts.down_proj"
    values = {
        "drop": [(k, v) for k, v in held.items() if k != name],
        "twice": [*held.items(), (name, held[name])],
        "shape": [(k, v[:-1] if k == name else v) for k, v in held.items()],
        "unknown": [*held.items(), ("model.layers.7.mlp.gate.weight", held["model.layers.1.mlp.gate.weight"])],
    }[change]
    with pytest.raises(ValueError, match=r"model\.layers\.[17]\.mlp"):
        fill(model, iter(values), torch.float32)


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [False, True], ids=["new", "over an earlier one"])
def test_a_kill_at_any_moment_leaves_a_whole_export_or_none(runs, tmp_path, again, stride):
    """And the next export of the same name finishes, with nothing of the dead one left."""
    command = ("--checkpoint", runs / "zero2-float32", "--output")
    for moment in range(0, 2000, stride):
        out = tmp_path / f"{moment}" / "hf"
        out.parent.mkdir()
        if again:
            export(*command, out)
        killed = in_child(out.parent, moment, lambda out=out: export(*command, out, "--dtype", "float32"))
        if out.exists() or again:
            files = manifest.read_manifest(out)["files"]
            manifest.check_files(out, files, files)
        if moment % (5 * stride) == 0 or killed is None:
            export(*command, out)
            assert [p.name for p in out.parent.iterdir()] == ["hf"]
        shutil.rmtree(out.parent)
        if killed is None:
            break
        assert killed == signal.SIGKILL
    assert killed is None and moment > 40, f"{moment} kills struck; the last export was to finish"


def test_a_full_disk_leaves_no_half_an_export(runs, tmp_path):
    """By RLIMIT_FSIZE, in a process of its own: the weights do not fit."""
    command = [sys.executable, ROOT / "launch/export.py", "--checkpoint", runs / "zero2-float32", "--output", tmp_path / "hf"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert result.returncode == 2 and "File too large" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []
