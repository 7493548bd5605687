"""What DeepSpeed says while it loads, in words that name the key."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from data.cli import UserError
from launch.checkpoint.restore import _load_plainly


class Refusing:
    def __init__(self, said: str) -> None:
        self.said = said

    def zero_sub_group_size(self) -> int:
        return 3000

    def load_checkpoint(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(self.said)


def test_other_sub_groups_are_named() -> None:
    """By which key, and what it was by default, DeepSpeed does not say."""
    said = "same parameter placement"
    assert said in inspect.getsource(DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict)
    with pytest.raises(UserError, match=r"step_4 was saved with another .*\.sub_group_size than 3,000, .*\(1,000,000,000"):
        _load_plainly(Refusing(f"with the {said} topology"), Path("step_4"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        _load_plainly(Refusing("out of memory"), Path("step_4"))  # type: ignore[arg-type]
