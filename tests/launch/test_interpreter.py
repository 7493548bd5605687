"""How Python was started, where the libraries cannot work: one sentence, from every command of `launch/`."""

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


@pytest.mark.parametrize("env", [{"PYTHONOPTIMIZE": "1"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}])
def test_others_work(env: dict[str, str]) -> None:
    assert start(env, "launch/train.py", "--help").returncode == 0


def test_one_rank_speaks() -> None:
    assert start({"PYTHONOPTIMIZE": "2", "RANK": "1"}, "launch/train.py", "--help").stderr == ""
