"""Every escape of escapes.py works without a sandbox and at no level of it, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, readable_copy, without_path

from launch.evaluation.sandbox.levels import LEVELS, open_python

SCRIPT = "tests/launch/evaluation/escapes.py"
SECONDS = 120
NO_SUCH_LEVEL = 3
ORDINARY = 64000  # the number of a user that nobody has, and one more for each run: the kernel counts processes by user
WAYS = ("none", *LEVELS)


def command_as(user: str, way: str, copy: Path) -> list[str]:
    if user == "this user":
        return [sys.executable, str(ROOT / SCRIPT), way]
    number = str(ORDINARY + WAYS.index(way))
    return ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", open_python(), str(copy / SCRIPT), way]


@pytest.fixture(scope="module")
def started() -> Iterator[dict[tuple[str, str], subprocess.Popen[str]]]:
    """All of them at once: they mostly wait."""
    users = ["this user", *(["an ordinary user"] if os.getuid() == 0 else [])]
    found = {}
    with readable_copy("data", "launch", SCRIPT) as copy:
        for user in users:
            for way in WAYS:
                found[user, way] = subprocess.Popen(
                    command_as(user, way, copy),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**without_path(), "CALLERS_SECRET": "x"},
                )
        yield found
        for process in found.values():
            process.kill()
            process.wait()


def result(started: dict[tuple[str, str], subprocess.Popen[str]], user: str, way: str) -> dict:
    if (user, way) not in started:
        pytest.skip("only root can start tests as another user")
    process = started[user, way]
    output, errors = process.communicate(timeout=SECONDS)
    if process.returncode == NO_SUCH_LEVEL:
        pytest.skip(f"{way} does not start on this machine: {errors.strip()}")
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output)


@pytest.mark.parametrize("user", ["this user", "an ordinary user"])
def test_escapes_and_what_contains_them(started: dict, user: str) -> None:
    without = result(started, user, "none")["got_out"]
    assert all(without.values()), f"these prove nothing: {[name for name, out in without.items() if not out]}"
    tried = 0
    for level in LEVELS:
        try:
            found = result(started, user, level)
        except pytest.skip.Exception:
            continue
        assert found["works"], f"a harmless program fails at {level}"
        if all(found["holds"].values()):  # else the probe says so, and --require_isolation refuses the level
            tried += 1
            assert not any(found["got_out"].values()), (level, [name for name, out in found["got_out"].items() if out])
            assert set(found["got_out"]) == set(without)
    if not tried:
        pytest.skip("no level of the sandbox is complete on this machine")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("user", ["this user", "an ordinary user"])
def test_the_level_is_tried_here(started: dict, user: str, level: str) -> None:
    """By name what could not be tried on this machine."""
    holds = result(started, user, level)["holds"]
    if not all(holds.values()):
        pytest.skip(f"{level} holds only in part here: {holds}")
