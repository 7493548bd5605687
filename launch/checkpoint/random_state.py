"""The random states of a process: torch, numpy, Python and its GPU. What dropout draws after a resume depends on them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from launch.toolchain import trains_on_gpu


def random_state() -> dict[str, Any]:
    """Loadable with `weights_only=True`."""
    version, internal, gauss = random.getstate()
    numpys = np.random.get_state(legacy=False)
    assert isinstance(numpys, dict) and numpys["bit_generator"] == "MT19937"
    inner = numpys["state"]
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(inner["key"].astype(np.int64)),
            "numbers": [inner["pos"], numpys["has_gauss"], numpys["gauss"]],
        },
    }
    if trains_on_gpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken. A GPU's state is kept for a process that has one."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["numbers"]))
    if "cuda" in state and trains_on_gpu():
        torch.cuda.set_rng_state(state["cuda"])
