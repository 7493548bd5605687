"""How Python was started, where the libraries cannot work: one sentence, from every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import write_run
from support import ROOT

NO_DOCSTRINGS = "Python runs without docstrings, and transformers needs them"

WITHOUT = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONOPTIMIZE", "PYTHONCOERCECLOCALE")
ENV = {name: value for name, value in os.environ.items() if name not in WITHOUT}


def start(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True, check=False)


def test_ascii_alone_is_refused() -> None:
    done = start({"LC_ALL": "C", "PYTHONUTF8": "0"}, "launch/train.py", "--help")
    assert done.returncode == 2 and done.stderr.startswith("error: Python reads all text as ASCII") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "launch/generate.py --model {folder} --prompt x",
        "launch/benchmark.py moe --help",
        "launch/quickstart.py --folder {folder}",
        "launch/exporting/gguf.py --model {folder} --converter none --output {folder}/x",
    ],
)
def test_no_docstrings_are_refused_by_what_loads_transformers(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}')
    done = start({"PYTHONOPTIMIZE": "2"}, *command.format(folder=tmp_path).split())
    assert done.returncode == 2 and done.stderr.startswith(f"error: {NO_DOCSTRINGS}") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout


def test_no_docstrings_are_enough_for_what_does_not_load_transformers(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for command in (["plan.py", "--gpu", "h200", "--model", "tiny"], ["report.py", tmp_path / "run"], ["benchmark.py", "--help"]):
        done = start({"PYTHONOPTIMIZE": "2"}, f"launch/{command[0]}", *map(str, command[1:]))
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("command", ["preprocess", "verify"])
def test_ascii_alone_is_refused_by_the_commands_of_data_too(command: str) -> None:
    """Shards were made where no command could train on them."""
    done = start({"LC_ALL": "C", "PYTHONUTF8": "0"}, f"data/{command}.py", "--help")
    assert done.returncode == 2 and done.stderr.startswith("error: Python reads all text as ASCII")
    assert start({"LC_ALL": "C"}, f"data/{command}.py", "--help").returncode == 0


@pytest.mark.parametrize("env", [{"PYTHONOPTIMIZE": "1"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}])
def test_others_work(env: dict[str, str]) -> None:
    assert start(env, "launch/train.py", "--help").returncode == 0


@pytest.mark.parametrize(("rank", "said"), [("0", f"error: {NO_DOCSTRINGS}"), ("1", "")])
def test_one_rank_speaks(rank: str, said: str, tmp_path: Path) -> None:
    env = {"PYTHONOPTIMIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    done = start(env, "launch/train.py", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.partition(";")[0] == said


def test_one_rank_speaks_where_the_launcher_has_another_name_for_the_rank() -> None:
    """Under srun and mpiexec RANK is what `main` makes of theirs: every rank said what rank 0 says for all."""
    program = "import os; from launch.cli import AgreedError, run_command\ndef main():\n    os.environ['RANK'] = '{}'\n"
    program += "    raise AgreedError('no such data')\nrun_command(main)"
    for rank, said in ((0, "error: no such data\n"), (1, "")):
        done = start({"RANK": ""}, "-c", f"import os; del os.environ['RANK']\n{program.format(rank)}")
        assert (done.returncode, done.stderr) == (2, said)
