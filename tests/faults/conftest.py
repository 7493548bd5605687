"""The site of the fault tests, the run that nothing happened to, and the table of what struck."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
from nursery import Nursery
from runs import STEPS, TALLY, Site, rows


@pytest.fixture(scope="session")
def site(nursery: Nursery, small_shards: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two ranks; experts with dropout, so that random states matter."""
    folder = tmp_path_factory.mktemp("site")
    config = json.loads(small_model.read_text())
    config["expert_dropout"] = 0.1
    model = folder / "model.json"
    model.write_text(json.dumps(config))
    return Site(nursery=nursery, shards=small_shards, model=model, folder=folder)


@pytest.fixture(scope="session")
def whole(site: Site) -> Path:
    """The uninterrupted run that the others are compared with."""
    run = site.folder / "whole"
    started = time.monotonic()
    site.finish(run)
    site.seconds = time.monotonic() - started
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 1))
    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """By its report, since the test may have run in another process than the one that prints the table."""
    report = yield
    report.user_properties += [("fault", strike) for strike in TALLY]
    TALLY.clear()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Faults tried, survived, bytes lost. A fault is survived if the test in which it struck passed."""
    by_fault: dict[str, list[tuple[bool, int]]] = defaultdict(list)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, strike in getattr(report, "user_properties", ()):
            if name == "fault":
                fault, lost = strike
                by_fault[fault].append((report.passed, lost))
    if not by_fault:
        return
    lines = [
        (fault, len(all_), sum(passed for passed, _ in all_), sum(lost for _, lost in all_)) for fault, all_ in by_fault.items()
    ]
    lines.sort()
    lines.append(("all", *(sum(line[i] for line in lines) for i in (1, 2, 3))))
    terminalreporter.write_sep("=", "faults")
    for fault, tried, survived, lost in [("fault", "tried", "survived", "bytes lost"), *lines]:
        terminalreporter.write_line(f"{fault:64}{tried:>7}{survived:>10}{lost:>12}")
