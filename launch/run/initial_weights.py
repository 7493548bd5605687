"""`--init_from`: the weights of an exported folder, or of a stock Glm4Moe one, into a model that is already where it trains.

One tensor at a time: eight ranks with a whole fp32 copy of the `4b` preset each would take 140 GB of host memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.cli import UserError
from launch.checkpoint.finite import is_finite
from launch.exported.files import check_weights
from launch.exported.model import check_arithmetic
from model import MoEGPTForCausalLM
from model.glm4_moe import expert_name, expert_place


@torch.no_grad()
def load_weights(model: MoEGPTForCausalLM, folder: Path) -> None:
    """Every weight, each once and in its shape. Raises UserError with the one that is missing, does not fit or is not finite."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UserError(f"--init_from {folder} is not an exported model; make one with launch/export.py")
    check_arithmetic(folder, model.config)
    check_weights(folder)
    wanted = model.state_dict()
    left = {name: place.numel() for name, place in wanted.items()}  # numbers that nothing has filled yet
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    value = tensors.get_tensor(name)
                    _copy(value, wanted, name, file)
                    left[name if name in wanted else expert_name(name)] -= value.numel()
        except SafetensorError as error:
            raise UserError(f"--init_from {file} is damaged: {error}") from None
    if model.config.tie_word_embeddings:
        left.pop("lm_head.weight")
    missing = sorted(name for name, numbers in left.items() if numbers)
    if missing:
        some = "not all of" if left[missing[0]] < wanted[missing[0]].numel() else "no"
        raise UserError(f"--init_from {folder} has {some} {missing[0]} ({len(missing)} weights are missing)")


def _copy(value: Tensor, wanted: dict[str, Tensor], name: str, file: Path) -> None:
    place = wanted[name] if name in wanted else expert_place(wanted, name)
    if place is None or place.shape != value.shape:
        expected = "none such" if place is None else tuple(place.shape)
        raise UserError(f"--init_from {file} does not fit the model: {name} is {tuple(value.shape)}, the model wants {expected}")
    if not is_finite(value):
        raise UserError(f"--init_from {file}: {name} holds numbers that are not finite; export it again, from a checkpoint that is")
    place.copy_(value)
