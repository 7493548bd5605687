"""Every command of every README: its flags exist, and at tiny size it runs."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from readme_commands import LAUNCHERS, Command, commands, readmes
from support import ROOT

ALL = [command for readme in readmes() for command in commands(readme)]
OURS = [command for command in ALL if command.script]
#: Programs that are not ours. What stands here is not run, so each has its reason.
FOREIGN = {
    "make": "its targets are asked for below; quickstart has its own test, and make test is this",
    "pip": "installs what is installed",
    "source": "enters the environment that is entered",
    "git": "needs the network",
    "wandb": "needs an account",
    "sbatch": "needs Slurm",
    "vllm": "a server of another project; tests/launch has the export that it reads",
    "lm_eval": "another project, marked slow elsewhere",
    "huggingface-cli": "needs the network",
    "hf": "needs the network",
}
#: Where a script makes its parser, if not in itself.
PARSERS = {
    "data/preprocess.py": "data.pipeline.arguments",
    "launch/train.py": "launch.run.arguments",
    "launch/plan.py": "launch.planning.arguments",
}
#: What has a test of its own at tiny size, and takes minutes at the size of its text.
ELSEWHERE = {
    "launch/benchmark.py": "tests/model/test_model_benchmarks.py",
    "launch/quickstart.py": "tests/launch/test_quickstart.py",
}


def test_there_are_commands() -> None:
    scripts = {command.script for command in OURS}
    assert {"data/preprocess.py", "launch/train.py", "launch/export.py", "launch/generate.py", "launch/evaluate.py"} <= scripts


@pytest.mark.parametrize("command", ALL, ids=str)
def test_the_command_exists(command: Command) -> None:
    """Scripts, flags, launchers, make's targets and files of the repository are there."""
    if command.script is None:
        assert command.program in FOREIGN, f"{command}: neither ours nor named in FOREIGN"
        if command.program == "make":
            subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert (ROOT / command.script).is_file(), f"{command}: there is no {command.script}"
    assert command.program in LAUNCHERS, f"{command}: started by {command.program}?"
    for word in command.flags:
        if word.startswith(("ds_configs/", "launch/", "tests/")):
            assert (ROOT / word).exists(), f"{command}: there is no {word}"
    parser = parser_of(command.script)
    if parser is not None:
        parser.parse_args(command.flags)


def test_each_target_of_make_does_something() -> None:
    """Without a rule a target named in .PHONY ends with 0, and nothing was done."""
    named = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    targets = named.split()[1:]
    assert "served" in targets
    for target in targets:
        said = subprocess.run(["make", "--always-make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, text=True)
        assert "Nothing to be done" not in said.stdout, target


def test_another_build_of_pytorch_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    """README's remedy for an old driver did nothing, since an environment was there already."""
    other = "torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"
    (tmp_path / "installed").write_text(f"{ROOT}\ntorch==2.13.0\n")

    def would_do(*words: str) -> str:
        command = ["make", "--dry-run", "install", f"VENV={tmp_path}", *words]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "Nothing to be done" in would_do() and f"pip install --quiet {other}" in would_do(f"TORCH={other}")
    (tmp_path / "installed").write_text(f"{ROOT}\n{other}\n")
    assert "Nothing to be done" in would_do() and "Nothing to be done" in would_do(f"TORCH={other}")
    assert other in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("venv", [".venv", "mine"])
def test_clean_takes_what_make_makes_again(venv: str, tmp_path: Path) -> None:
    """It took all of runs/, where the README's commands train for days, and whatever environment VENV named."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    files = [".venv/installed", "mine/installed", "runs/first/metrics.jsonl", "runs/quickstart/a", "runs/served/a", "build/a"]
    for file in (tmp_path / name for name in files):
        file.parent.mkdir(parents=True)
        file.touch()

    def left() -> list[str]:
        subprocess.run(["make", "clean", f"VENV={venv}"], cwd=tmp_path, check=True, capture_output=True)
        return [name for name in files if (tmp_path / name).exists()]

    ours = [".venv/installed"] if venv != ".venv" else []
    assert left() == [*ours, "mine/installed", "runs/first/metrics.jsonl"]
    (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".venv" / "installed").unlink(missing_ok=True)
    left()
    assert (tmp_path / ".venv" / "bin").is_dir(), "another tool's"


def parser_of(script: str) -> ArgumentParser | None:
    """None for a script that makes its parser when it runs; those are run."""
    module = importlib.import_module(PARSERS.get(script, script.removesuffix(".py").replace("/", ".")))
    build = getattr(module, "build_parser", None)
    return build() if build else None


# ------------------------------------------------------------------ at tiny size


@pytest.fixture
def reader(small_shards: Path, small_model: Path, tmp_path: Path) -> Path:
    """A folder like a clone's, with what a reader is told to have: a corpus, code, benchmarks, shards."""
    for name in ("data", "launch", "model", "ds_configs", "tests", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "src").mkdir()
    library = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
    for path in library:
        shutil.copy(path, tmp_path / "src")
    for number in range(2):
        rows = [{"content": path.read_text("utf-8", "replace"), "license": "mit"} for path in library[number::2]]
        with gzip.open(tmp_path / f"corpus/{number}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(problem) + "\n")
    mbpp = {"task_id": 1, "text": "Return one.", "code": "def one():\n    return 1", "test_list": ["assert one() == 1"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(mbpp) + "\n")
    shutil.copytree(small_shards, tmp_path / "shards")
    shutil.copy(small_model, tmp_path / "tiny_config.json")
    return tmp_path


def shrunk(command: Command, folder: Path) -> list[str]:
    """The command with its sizes made tiny; every other word as it stands in the text."""
    assert command.script is not None
    start, flags = list(command.words[: command.words.index(command.script) + 1]), command.flags
    for option, value in (("--num_gpus", "2"), ("-n", "2"), ("--nproc_per_node", "2")):
        if option in start:
            start[start.index(option) + 1] = value
    if start[0] in ("python", "python3"):
        start[0] = sys.executable
    if command.script == "data/preprocess.py":
        if "--tokenizer" in flags:
            change(flags, "--tokenizer", str(folder / "shards.first/tokenizer"))
        if "--train_tokenizer" in flags:
            change(flags, "--train_tokenizer", str(json.loads((folder / "tiny_config.json").read_bytes())["vocab_size"]))
        change(flags, "--workers", "1")
        change(flags, "--validation_fraction", "0.2")
    if command.script == "launch/train.py":
        shrink_training(flags, folder)
    if command.script == "launch/generate.py":
        change(flags, "--max_new_tokens", "4")
    if command.script == "launch/evaluate.py":
        for option in ("--samples", "--max_new_tokens"):
            if option in flags:
                change(flags, option, "2")
    return [*start, *flags]


def change(flags: list[str], option: str, value: str) -> None:
    if option in flags:
        flags[flags.index(option) + 1] = value
    else:
        flags += [option, value]


def shrink_training(flags: list[str], folder: Path) -> None:
    change(flags, "--model", "tiny_config.json")
    for option, value in (("--sequence_length", 64), ("--max_steps", 3), ("--eval_batches", 1), ("--log_interval", 1)):
        change(flags, option, str(value))
    change(flags, "--wandb", "disabled")
    if "--deepspeed_config" in flags:
        path = folder / flags[flags.index("--deepspeed_config") + 1]
        config = json.loads(path.read_text())
        config.update(train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps="auto")
        config["expert_parallel"]["autoep_size"] = min(2, config["expert_parallel"]["autoep_size"])
        (folder / f"tiny_{path.name}").write_text(json.dumps(config))
        change(flags, "--deepspeed_config", f"tiny_{path.name}")


@pytest.mark.slow
@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_runs(readme: Path, reader: Path) -> None:
    """Block by block in one folder, as a reader would; a block's outputs are new, what earlier blocks made is there."""
    shutil.move(reader / "shards", reader / "shards.first")
    ours = [command for command in commands(readme) if command.script and command.script not in ELSEWHERE]
    for source, block in itertools.groupby(ours, key=lambda command: command.source):
        listed = list(dict.fromkeys(block))
        for output in {value for command in listed for value in outputs(command)}:
            remove(reader / output)
        for command in listed:
            for needed in missing(command, reader):
                start(needed, reader)
            start(command, reader)
        print(f"{source}: {len(listed)} commands ran")


def start(command: Command, folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    line = shrunk(command, folder)
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}\nran as {line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def missing(command: Command, folder: Path) -> list[Command]:
    """What another README, or an earlier part of this one, has its reader make: shards, a run, an exported folder."""
    needs = [word.rstrip("/") for word in command.flags if word not in outputs(command)]
    runs = [word for word in needs if word.startswith("runs/") and not (folder / word).exists()]
    made = []
    if command.script != "data/preprocess.py" and not (folder / "shards").exists():
        shutil.copytree(folder / "shards.first", folder / "shards")
    if "hf" in needs and not (folder / "hf").exists():
        runs = runs or ["runs/first"]
        made = [Command(("python", "launch/export.py", "--checkpoint", runs[0], "--output", "hf"), command.source)]
    train = ("python", "launch/train.py", "--data", "shards", "--output")
    return [*(Command((*train, run), command.source) for run in runs if not (folder / run).exists()), *made]


def outputs(command: Command) -> list[str]:
    """What a command makes."""
    return [command.flags[at + 1] for at, flag in enumerate(command.flags) if flag in ("--output", "--write")]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
