"""What `selective` keeps and what it repeats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launch.engine.activation_checkpointing import selective_contexts

CALLS = {"flash": 0, "other": 0}


@torch.library.custom_op("flash_attn::_stand_in_forward", mutates_args=())
def flash_stand_in(x: Tensor) -> Tensor:
    CALLS["flash"] += 1
    return x * 2


@torch.library.custom_op("test_recomputed::double", mutates_args=())
def other(x: Tensor) -> Tensor:
    CALLS["other"] += 1
    return x * 2


flash_stand_in.register_autograd(lambda _, gradient: gradient * 2)
other.register_autograd(lambda _, gradient: gradient * 2)


def test_selective_keeps_the_attention_of_the_flash_packages() -> None:
    """flash-attn 2 and 3 register operators of their own; repeating one costs what attention costs."""

    def block(x: Tensor) -> Tensor:
        return (other(flash_stand_in(x.sin())) ** 2).sum()

    x = torch.randn(5, requires_grad=True)
    expected = torch.autograd.grad(((4 * x.sin()) ** 2).sum(), x)[0]
    loss = checkpoint(block, x, use_reentrant=False, context_fn=selective_contexts)
    assert torch.allclose(torch.autograd.grad(loss, x)[0], expected)
    assert CALLS == {"flash": 1, "other": 2}
