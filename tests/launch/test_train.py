"""`launch/train.py` as a user meets it: mistakes are one sentence and exit code 2 on every rank; a run leaves what it promises."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import Nursery
from support import ROOT, metrics

from launch import manifest

SHORT = ("--sequence_length", 64, "--max_steps", 3, "--eval_batches", 1, "--log_interval", 1, "--wandb", "disabled")


@pytest.fixture
def flags(small_shards: Path, small_model: Path, tmp_path: Path) -> list:
    return ["--data", small_shards, "--model", small_model, "--output", tmp_path / "run", *SHORT]


def refuse(done) -> str:
    """The one sentence of a refused command."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def changed(flags: list, **changes: object) -> list:
    flags = list(flags)
    for name, value in changes.items():
        if f"--{name}" in flags:
            flags[flags.index(f"--{name}") + 1] = value
        else:
            flags += [f"--{name}", value]
    return flags


def test_two_ranks_speak_once(flags: list, run_train, tmp_path: Path) -> None:
    sentence = refuse(run_train(2, *changed(flags, data=tmp_path / "nowhere")))
    assert "no shards at" in sentence and "nowhere" in sentence and "preprocess.py" in sentence


def test_every_rank_is_deterministic_before_it_joins(flags: list, nursery: Nursery, tmp_path: Path) -> None:
    """What cuBLAS would be told is refused; later it would not hear of it."""
    given, errors = [*flags, "--deterministic"], tmp_path / "errors"
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2"}
    assert nursery.start(2, "launch/train.py", *given, log=tmp_path / "log", errors=errors, env=env).wait() == [2, 2]
    (sentence,) = errors.read_text().splitlines()
    assert "--deterministic needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, not ':4096:2'" in sentence


FP16 = ROOT / "tests" / "fixtures" / "fp16.json"
# Those that are seen before the ranks join, then those after it.
MISTAKES = {
    "flag": ({"epochs": 3}, "unrecognized arguments: --epochs 3; --help lists the flags"),
    "preset": ({"model": "7b"}, "--model 7b is neither a preset (4b, 60m, 800m, tiny) nor a config.json"),
    "vocabulary": ({"model": "tiny"}, "tokenizer of 512 tokens and the model tiny has a vocabulary of 4096"),
    "init's model": ({"model": "tiny", "init_from": "hf"}, "to go on from hf name its model, --model hf/config.json"),
    "context": ({"sequence_length": 4096}, "1024 positions of {model}; copy the model's config.json ({model}) with"),
    "context of a trained model": (
        {"sequence_length": 4096, "init_from": "hf"},
        "1024 positions of {model}; --rope_factor extends them",
    ),
    "context of a run": ({"sequence_length": 4096, "resume": "elsewhere"}, "{model}; --rope_factor extends them"),
    "factor": ({"sequence_length": 4096, "rope_factor": 4}, "2048 positions of {model}; --rope_factor 4 counts from the 512 it"),
    "json": ({"deepspeed_config": "ds_configs/none.json"}, "is not a file; ds_configs/ has cpu_ep1_zero2.json"),
    "steps": ({"max_steps": 0}, "--max_steps must be at least 1"),
    "ranks": ({"deepspeed_config": "ds_configs/cpu_ep2_zero2.json"}, "autoep_size 2 does not divide the 1 ranks"),
    "fp16": ({"deepspeed_config": FP16}, "fp16.enabled: the CPU cannot train in fp16; use bf16.enabled"),
    "pattern": ({"output": "runs/br[lr=1]"}, "DeepSpeed takes '[' in a path for a pattern"),
    "weight": ({"data": "shards:much"}, "the weight after the colon must be a number"),
    "url": ({"data": "https://h/shards"}, "--data https://h/shards is a URL; give a folder of shards"),
}
LATER_MISTAKES = {
    "resume": ({"resume": "elsewhere"}, "--resume elsewhere: no checkpoint there"),
    "init": ({"init_from": "nothing"}, "--init_from nothing is not an exported model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake: str, flags: list) -> None:
    """In this process, up to where the ranks join."""
    changes, sentence = MISTAKES[mistake]
    from launch.run.arguments import parse_arguments
    from launch.run.resolve import resolve_run

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        arguments = parse_arguments([str(f) for f in changed(flags, **changes)])
        resolve_run(arguments, 1)
    assert sentence.format(model=flags[3]) in str(caught.value)


@pytest.mark.parametrize("mistake", LATER_MISTAKES)
def test_mistakes_after_joining(mistake: str, flags: list, forked_train) -> None:
    changes, sentence = LATER_MISTAKES[mistake]
    assert sentence in refuse(forked_train(1, *changed(flags, **changes)))


APART: dict[str, dict] = {
    "pre-scale gradients is not yet supported with ZeRO-2": {"prescale_gradients": True},
    "BF16 Muon currently requires FP32 accumulation, dense DP and eager execution": {
        "optimizer": {"type": "Muon", "params": {"lr": 0.001, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    },
}


@pytest.mark.parametrize("sentence", APART)
def test_settings_that_deepspeed_does_not_combine(sentence: str, flags: list, forked_train, tmp_path: Path) -> None:
    """Each is right in itself; DeepSpeed says it with an assertion or a ValueError while the engine is built."""
    config = json.loads(Path("ds_configs/cpu_ep1_zero2.json").read_text())
    path = tmp_path / "apart.json"
    path.write_text(json.dumps({**config, **APART[sentence]}))
    said = refuse(forked_train(1, *changed(flags, deepspeed_config=path)))
    assert f"DeepSpeed refuses these settings of --deepspeed_config: {sentence}" in said


def test_a_run_and_what_it_leaves(flags: list, run_train, forked_train, small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_train(1, *flags, "--rope_factor", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["samples"] for row in rows] == [16, 32, 48]
    assert all(len(row["load_max_over_mean"]) == 2 for row in rows)
    evaluated = [row for row in metrics(run) if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3]
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["rope_parameters"]["factor"] == 3.0
    assert config["versions"]["deepspeed"] and config["deepspeed"]["scheduler"]["params"]["total_num_steps"] == 3
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_3"
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == (small_shards / "tokenizer" / "tokenizer.json").read_bytes()

    # The same folder again: nothing left to do, and no harm; other settings: refused with the difference.
    again = forked_train(1, *flags, "--rope_factor", 3)
    assert again.returncode == 0 and "finished at step 3" in again.stderr
    pretend_an_older_transformers(run)
    upgraded = forked_train(1, *flags, "--rope_factor", 3)
    assert upgraded.returncode == 0 and "resuming from" in upgraded.stderr, upgraded.stderr[-2000:]
    assert "rope_parameters" in refuse(forked_train(1, *flags))


def pretend_an_older_transformers(run: Path) -> None:
    """The run and its checkpoint as another version of the library would have written them."""

    def older(values: dict) -> dict:
        return {**values, "model": {**values["model"], "transformers_version": "5.0.0", "a_field_that_was_dropped": 1}}

    config = json.loads((run / "config.json").read_text())
    assert config["model"]["transformers_version"] != "5.0.0"
    (run / "config.json").write_text(json.dumps(older(config)))
    checkpoint = run / "checkpoints" / "step_3"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_bytes(manifest.to_json({**state, "identity": older(state["identity"])}))
    record = manifest.record_file(checkpoint / "state.json")
    manifest.write_manifest(checkpoint, {**manifest.read_manifest(checkpoint)["files"], "state.json": record})


def test_a_folder_that_is_no_run(flags: list, forked_train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert "holds 'thesis.tex' but no run" in refuse(forked_train(1, *flags))
    shutil.rmtree(tmp_path / "run")


def test_patience_stops_early(flags: list, forked_train, small_model: Path, tmp_path: Path) -> None:
    """With a learning rate and a balancing rate of 0 no evaluation after the first is a new best."""
    model = tmp_path / "unbalanced.json"
    model.write_text(json.dumps({**json.loads(small_model.read_text()), "router_bias_rate": 0.0}))
    config = json.loads(Path("ds_configs/cpu_ep1_zero2.json").read_text())
    config["optimizer"]["params"]["lr"] = 0.0
    path = tmp_path / "still.json"
    path.write_text(json.dumps(config))
    settings = {"max_steps": 50, "eval_interval": 1, "patience": 2, "deepspeed_config": path, "model": model}
    done = forked_train(1, *changed(flags, **settings))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stopped early" in done.stderr
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 2


def test_two_ranks_without_a_compiler(flags: list, run_train, tmp_path: Path) -> None:
    """DeepSpeed's communication operator cannot be built; gloo reduces instead. Expert parallelism by the default strategy."""
    only_python = str(Path(sys.executable).parent)
    assert not shutil.which("c++", path=only_python)
    done = run_train(2, *flags, PATH=only_python, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks, expert parallel 2, ZeRO 2, bfloat16" in done.stderr
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses))  # which way they go depends on the texts, Python's own library


def test_verify_refuses_a_flipped_bit(flags: list, forked_train, small_shards: Path, tmp_path: Path) -> None:
    """Only `--verify` reads the sums; without it structure and sizes are checked, and a flipped bit passes."""
    damaged = tmp_path / "damaged"
    shutil.copytree(small_shards, damaged)
    path = next((damaged / "train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    sentence = refuse(forked_train(1, *changed(flags, data=damaged), "--verify"))
    assert path.name in sentence and "sha256" in sentence


def test_document_mask_trains(flags: list, forked_train, tmp_path: Path) -> None:
    done = forked_train(1, *changed(flags, max_steps=2), "--document_mask")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]


@pytest.mark.parametrize("name", ["model.py", "data/__init__.py"])
def test_a_module_on_pythonpath_does_not_hide_ours(name: str, run_train, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('somebody else')")
    done = run_train(1, "--help", PYTHONPATH=str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    assert done.returncode == 0 and "--sequence_length" in done.stdout, done.stderr


def test_help_is_printed_by_rank_0_alone(run_train) -> None:
    assert "--sequence_length" in run_train(1, "--help", RANK="0", WORLD_SIZE="2").stdout
    other = run_train(1, "--help", RANK="1", WORLD_SIZE="2")
    assert other.returncode == 0 and other.stdout == ""


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"data": "nowhere"}, "--data nowhere: no shards at nowhere"),
        ({"data": "nowhere:0.5"}, "--data nowhere:0.5: no shards at nowhere;"),
        ({"data": "nowhere:half"}, "--data nowhere:half: the weight after the colon must be a number, not 'half'"),
        ({"data": "s3://bucket/shards"}, "--data s3://bucket/shards is a URL"),
        ({"model": "nowhere.json"}, "--model nowhere.json is neither a preset"),
        ({"deepspeed_config": "nowhere.json"}, "--deepspeed_config nowhere.json is not a file"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(change: dict, sentence: str, flags: list) -> None:
    program = "import sys\nfrom launch.run.arguments import check_paths, parse_arguments\n"
    program += "try:\n    check_paths(parse_arguments(sys.argv[1:]))\nexcept ValueError as error:\n    print(error)\n"
    program += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, *(str(flag) for flag in changed(flags, **change))]
    said, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said.startswith(sentence) and loaded == "False"


def test_two_ranks_that_refuse_import_no_model() -> None:
    """What they join with is loaded, 1.3 s of CPU instead of 3.3."""
    program = "import sys, launch.train, launch.run.refuse\nprint(not {'transformers', 'model.modeling'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.endswith("True\n")
