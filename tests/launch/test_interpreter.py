"""How Python was started, where the libraries cannot work: one sentence, from every command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support import ROOT

WITHOUT = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONOPTIMIZE", "PYTHONCOERCECLOCALE")
ENV = {name: value for name, value in os.environ.items() if name not in WITHOUT}


def start(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"PYTHONOPTIMIZE": "2"}, "Python runs without docstrings, and transformers needs them; unset PYTHONOPTIMIZE"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "Python reads all text as ASCII"),
    ],
)
def test_refused(env: dict[str, str], sentence: str) -> None:
    done = start(env, "launch/train.py", "--help")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["preprocess", "verify"])
def test_ascii_alone_is_refused_by_the_commands_of_data_too(command: str) -> None:
    """Shards were made where no command could train on them."""
    done = start({"LC_ALL": "C", "PYTHONUTF8": "0"}, f"data/{command}.py", "--help")
    assert done.returncode == 2 and done.stderr.startswith("error: Python reads all text as ASCII")
    assert start({"LC_ALL": "C"}, f"data/{command}.py", "--help").returncode == 0


@pytest.mark.parametrize("env", [{"PYTHONOPTIMIZE": "1"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}])
def test_others_work(env: dict[str, str]) -> None:
    assert start(env, "launch/train.py", "--help").returncode == 0


def test_one_rank_speaks() -> None:
    assert start({"PYTHONOPTIMIZE": "2", "RANK": "1"}, "launch/train.py", "--help").stderr == ""


def test_one_rank_speaks_where_the_launcher_has_another_name_for_the_rank() -> None:
    """Under srun and mpiexec RANK is what `main` makes of theirs: every rank said what rank 0 says for all."""
    program = "import os; from launch.cli import AgreedError, run_command\ndef main():\n    os.environ['RANK'] = '{}'\n"
    program += "    raise AgreedError('no such data')\nrun_command(main)"
    for rank, said in ((0, "error: no such data\n"), (1, "")):
        done = start({"RANK": ""}, "-c", f"import os; del os.environ['RANK']\n{program.format(rank)}")
        assert (done.returncode, done.stderr) == (2, said)
