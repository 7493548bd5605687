"""Every benchmark that needs no input, one after the other, within a budget of time that they divide.

Each has an equal share of what is left when its turn comes, so what one does not use is the others'. One that takes longer than
its share is ended, and its figures are missing, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.terminal import say
from launch.cli import CLONE

UNITS = {"s": 1, "m": 60, "h": 3600}
#: Smaller than their own defaults where there is no GPU; `--full` takes the defaults. On two cores that nobody else uses each
#: takes 5 to 25 s, so that ten minutes are enough for a busy machine.
SHORT: dict[str, tuple[str, ...]] = {
    "attention": ("--length", "512", "--repeats", "2"),
    "loss": ("--tokens", "2048", "--vocabulary", "16384", "--repeats", "1"),
    "moe": ("--model", "tiny", "--repeats", "2"),
    "generate": ("--repeats", "2"),
    "step": ("--sequence_length", "128", "--micro_batch", "4", "--steps", "5"),
    "growth": ("--tokens", "1024", "2048", "4096", "--repeats", "1"),
    "data": ("--batches", "100", "--repeats", "2"),
}


def budget(text: str) -> float:
    """`90s`, `10m` or `2h`, in seconds. For argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=budget, default="10m", metavar="TIME", help="time for all of them: 90s, 10m, 2h")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these")
    parser.add_argument("--full", action="store_true", help="use the full default sizes even without a GPU")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`{name: {"seconds", "result" or "reason"}}`."""
    from launch.benchmark import BENCHMARKS
    from launch.toolchain import default_device

    short = not arguments.full and default_device() == "cpu"
    names = [name for name in BENCHMARKS if name != "all" and (arguments.only is None or name in arguments.only)]
    if unknown := set(arguments.only or ()) - set(names):
        raise UserError(f"--only {sorted(unknown)[0]}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    waiting = [name for name in names if not needs_input(name)]
    results: dict[str, Any] = {name: {"reason": "needs input of its own"} for name in names if name not in waiting}
    deadline = time.monotonic() + arguments.budget
    while waiting:
        share = (deadline - time.monotonic()) / len(waiting)
        name = waiting.pop(0)
        say(f"{name}: at most {share:.0f} s")
        results[name] = run_one(name, SHORT.get(name, ()) if short else (), share)
        say(f"{name}: {results[name].get('reason') or 'done'}, {results[name]['seconds']:.0f} s")
    return results


def needs_input(name: str) -> bool:
    """It has a flag that must be given."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"launch.benchmarks.{name}").add_arguments(parser)
    return any(action.required for action in parser._actions)


def run_one(name: str, flags: tuple[str, ...], share: float) -> dict[str, Any]:
    """In a process of its own: one that hangs or fails does not end the others."""
    began = time.monotonic()
    if share <= 0:
        return {"reason": "no time left", "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, str(CLONE / "launch" / "benchmark.py"), name, *flags, "--output", str(output)]
        try:
            done = subprocess.run(command, timeout=share, check=False)
            reason = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"not done after its share of {share:.0f} s"
        found: dict[str, Any] = {"seconds": time.monotonic() - began}
        return found | ({"reason": reason} if reason else {"result": json.loads(output.read_text(encoding="utf-8"))})
