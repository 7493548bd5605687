"""The buffers that belong to the model's state: the routers' correction biases, in a file of their own.

DeepSpeed's universal checkpoint restores parameters only: without this file the biases would be zero again after a conversion.
"""

from __future__ import annotations

from torch import Tensor, nn

from data.cli import UserError

BUFFERS = "buffers.pt"


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """By name, the same on every rank."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if name not in parameters}


def restore_buffers(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy the saved buffers in place, bit for bit. Raises UserError where names, shapes or dtypes differ."""
    live = persistent_buffers(module)
    if live.keys() != saved.keys():
        raise UserError(f"the checkpoint's buffers differ from the model's: {sorted(live.keys() ^ saved.keys())[:5]}")
    for name, value in saved.items():
        if live[name].shape != value.shape or live[name].dtype != value.dtype:
            raise UserError(
                f"buffer {name}: {tuple(value.shape)} {value.dtype} saved, {tuple(live[name].shape)} {live[name].dtype} wanted"
            )
        live[name].copy_(value)
