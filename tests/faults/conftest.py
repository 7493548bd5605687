"""The site of the fault tests, and the run that nothing happened to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nursery import Nursery
from runs import STEPS, Site, rows


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
    site.finish(run)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 1))
    return run
