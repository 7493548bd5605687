"""All four generators go on where they were; the state survives a restricted load, and older checkpoints' states are read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from launch.checkpoint import random_state as module
from launch.checkpoint.random_state import random_state, set_random_state
from launch.checkpoint.unpickle import load_file

OLD = ROOT / "tests" / "fixtures" / "before_the_move" / "run" / "checkpoints" / "step_6" / "rng_00000.pt"


def draw() -> list[float]:
    """Gaussians too: Python and numpy keep the second of a pair for the next call."""
    return [
        float(torch.rand(())),
        float(torch.randn(())),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
    ]


def test_what_is_drawn_after_is_the_same(tmp_path: Path) -> None:
    draw()  # so that a second Gaussian is waiting
    torch.save(random_state(), tmp_path / "rng.pt")
    expected = [draw(), draw()]
    draw()
    set_random_state(load_file(tmp_path / "rng.pt", mmap=False))
    assert [draw(), draw()] == expected


def test_a_gpus_state_is_kept_and_set_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a GPU is also loaded on a CPU."""
    was_set: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", was_set.append)
    monkeypatch.setattr(module, "trains_on_gpu", lambda: False)
    of_cpu = random_state()
    monkeypatch.setattr(module, "trains_on_gpu", lambda: True)
    of_gpu = random_state()
    assert "cuda" not in of_cpu
    for state in (of_cpu, of_gpu):
        set_random_state(state)
    assert was_set == [of_gpu["cuda"]] == [torch.tensor([7])]
    monkeypatch.setattr(module, "trains_on_gpu", lambda: False)
    set_random_state(of_gpu)
    assert len(was_set) == 1


def test_a_state_of_an_older_checkpoint_is_read() -> None:
    kept = random_state()
    set_random_state(load_file(OLD, mmap=False))
    first = draw()
    set_random_state(load_file(OLD, mmap=False))
    assert draw() == first
    set_random_state(kept)
