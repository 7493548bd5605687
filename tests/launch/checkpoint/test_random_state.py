"""All four generators go on where they were; the state survives a restricted load, and older checkpoints' states are read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from support import ROOT

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


def test_a_state_of_an_older_checkpoint_is_read() -> None:
    kept = random_state()
    set_random_state(load_file(OLD, mmap=False))
    first = draw()
    set_random_state(load_file(OLD, mmap=False))
    assert draw() == first
    set_random_state(kept)
