"""Shared by the model's tests."""

import sys
from pathlib import Path

import pytest
import torch

# `tests.reference` and the packages are found however pytest was started.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
