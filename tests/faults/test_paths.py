"""One list of odd names through every command: each works, or is refused in one sentence before anything is read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Site, struck

import data.preprocess
import data.verify
import launch.export
import launch.plan
import launch.report
from data.cli import UserError
from launch.run.arguments import build_parser, parse_arguments

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "before_the_move"
ODD = {
    "spaces": " a  b ",
    "quotes": "a'b\"c`d",
    "newline": "a\nb\tc",
    "dash": "-rf",
    "dollar": "$HOME;ls %s {x} ~",
    "combining": "e\u0301 \u0308 \u65e5\u672c",
    "pattern": "br[lr=1]*?",
    "no UTF-8": os.fsdecode(b"a\xffb"),
    "255": "n" * 255,
    "256": "n" * 256,
    "slash": "a/",
    "link": "linked",
    "read-only": "read-only/x",
}
TOO_LONG, CLOSED = "File name too long", "Permission denied"
#: What is refused, and how; everything else works.
REFUSED = {
    **{(command, "256"): TOO_LONG for command in ("preprocess", "verify", "report", "plan", "export", "train")},
    **{(command, "read-only"): CLOSED for command in ("preprocess", "export")},
    ("export", "255"): "the name is too long",
    ("export", "no UTF-8"): "names that are UTF-8",
    ("train", "pattern"): "takes '\\[' in a path for a pattern",
}


def preprocess(path: str) -> None:
    run(data.preprocess.main, "--input", "code", "--tokenizer", "tokenizer.json", f"--output={path}", "--workers", "1")


def verify(path: str) -> None:
    if not Path(path).exists():
        shutil.copytree(OLD / "tokens", path)
    run(data.verify.main, "--", path)


def a_run(path: str) -> str:
    if not (Path(path) / "metrics.jsonl").exists():
        shutil.copytree(OLD / "run", path, dirs_exist_ok=True)
    return path


def report(path: str) -> None:
    run(launch.report.main, "--", a_run(path))


def plan(path: str) -> None:
    run(launch.plan.main, f"--from={a_run(path)}")


def export(path: str) -> None:
    run(launch.export.main, f"--checkpoint={a_run('run')}", f"--output={path}")


def train(path: str) -> None:
    """As far as the flags; one run under an odd name is below."""
    parse_arguments(["--data", "x", f"--output={path}"])


COMMANDS: list[Callable[[str], None]] = [preprocess, verify, report, plan, export, train]


def run(main: Callable[[], int | None], *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *flags])
        patch.setattr("launch.export.make_quiet", lambda: None)  # it would silence the tests that follow
        assert not main()
