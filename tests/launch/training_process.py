"""Ranks of a small real training run (DeepSpeed, AutoEP, gloo), for tests that look inside one.

`launch_ranks(nursery, 2, "function", folder=FOLDER, **arguments)` runs a function of `scenarios.py` in that many processes and
returns what it returned on rank 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nursery import Nursery, Ranks

SCENARIOS = Path(__file__).with_name("scenarios.py")


def start_ranks(nursery: Nursery, world_size: int, scenario: str, *, folder: Path, **arguments: Any) -> Ranks:
    """`folder`: what the scenario works in; its answer and what the ranks say lie beside it."""
    given = json.dumps({"folder": folder, "answer": beside(folder, scenario, "json"), **arguments}, default=str)
    return nursery.start(world_size, str(SCENARIOS), scenario, given, log=beside(folder, scenario, "log"))


def launch_ranks(nursery: Nursery, world_size: int, scenario: str, *, folder: Path, **arguments: Any) -> Any:
    """Run to the end; returns what rank 0 returned (through JSON). A failing rank fails the test with its output."""
    ranks = start_ranks(nursery, world_size, scenario, folder=folder, **arguments)
    assert ranks.wait(300) == [0] * world_size, f"{scenario}: exit codes {ranks.codes}\n{ranks.text()[-6000:]}"
    return json.loads(beside(folder, scenario, "json").read_text())


def beside(folder: Path, scenario: str, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{scenario}.{ending}")
