"""Buffers come back bit for bit and in place; another model's are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.checkpoint.buffers import persistent_buffers, restore_buffers


def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    made.register_buffer("scratch", torch.ones(3), persistent=False)
    made.register_buffer("bias", torch.tensor([0.1, -0.2]))
    return made


def test_only_what_belongs_to_the_state_is_kept() -> None:
    assert set(persistent_buffers(module())) == {"bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_weight_that_has_two_names_is_no_buffer() -> None:
    """As a head that is the embedding: the optimizer's file has it."""
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made[1].weight = made[0].weight
    assert persistent_buffers(made) == {}


def test_they_come_back_in_place() -> None:
    one, other = module(), module()
    one.bias.copy_(torch.tensor([0.3, 1e-30]))
    one[1].num_batches_tracked.fill_(7)
    where = other.bias.data_ptr()
    restore_buffers(other, persistent_buffers(one))
    assert torch.equal(other.bias, one.bias) and other.bias.data_ptr() == where and int(other[1].num_batches_tracked) == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"other": torch.zeros(2)}, r"buffers differ from the model's: \['other'\]"),
        ({"bias": torch.zeros(3)}, r"buffer bias: \(3,\) torch.float32 saved, \(2,\) torch.float32 wanted"),
        ({"bias": torch.zeros(2, dtype=torch.bfloat16)}, "buffer bias: .*bfloat16 saved"),
    ],
)
def test_another_models_are_refused(change: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        restore_buffers(module(), {**persistent_buffers(module()), **change})
