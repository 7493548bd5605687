"""`launch/generate.py` on a small exported folder, and what bad input gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT


def run(script: str, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"launch/{script}.py", *(str(flag) for flag in flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_generation_is_greedy_sampled_and_seeded(exported: Path, forked: Callable) -> None:
    flags = ("--model", exported, "--prompt", "def f(x):", "--max_new_tokens", 12)
    again = forked("launch/generate.py", *flags, "--temperature", 0)
    greedy = [run("generate", *flags, "--temperature", 0).stdout, again.stdout]
    sampled = (*flags, "--temperature", 1.0, "--top_p", 1.0, "--seed")
    seeded = [forked("launch/generate.py", *sampled, seed).stdout for seed in (1, 1, 2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("def f(x):") and len(greedy[0]) > len("def f(x):\n")
    assert seeded[0] == seeded[1] != seeded[2]


MISTAKES = [
    ("evaluate", ["--model", "EXPORTED", "--data", "x", "--output", "/no/folder/e.json"], "there is no such folder to write to"),
    ("evaluate", ["--model", "EXPORTED", "--data", "x", "--output", "/dev/null"], "not a regular file"),
    ("evaluate", ["--model", "EXPORTED", "--data", "x", "--output", "/tmp"], "is a folder; name a file in it"),
    ("generate", ["--model", "nowhere", "--prompt", "x"], "--model nowhere has no config.json"),
    ("generate", ["--model", "EXPORTED", "--prompt", ""], "--prompt is empty"),
    ("generate", ["--model", "EXPORTED", "--prompt", "x", "--max_new_tokens", 5000], "beyond the model's 1024 positions"),
    ("generate", ["--model", "EXPORTED", "--prompt", "x", "--temperature", -1], "--temperature must be 0 (the likeliest token) or"),
    ("generate", ["--model", "EXPORTED", "--prompt", "x", "--top_p", 0], "--top_p must be above 0"),
]


@pytest.mark.parametrize(("script", "flags", "sentence"), MISTAKES, ids=[s for *_, s in MISTAKES])
def test_mistakes_are_one_sentence(script: str, flags: list, sentence: str, exported: Path) -> None:
    done = run(script, *(exported if flag == "EXPORTED" else flag for flag in flags))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and sentence in done.stderr
