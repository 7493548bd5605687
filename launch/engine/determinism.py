"""`--deterministic`: the same command gives the same numbers, to the bit, on GPUs too. On CPUs it does anyway.

What it takes, by PyTorch 2.13's documentation and the sources of PyTorch, DeepSpeed 0.19.8 and flash-attn (no GPU has run it):

- Flash attention's backward adds up dq by atomics; told so it keeps an order (`model/flash.py`).
- `scatter_add_`, `scatter_`, `index_add_`, `index_put_`, `gather`'s gradient: PyTorch takes a way by a sort. What would raise
  (`histc`, `cumsum` of floats, `put_`) neither the model nor DeepSpeed's step calls; the cumulative sums are of integers.
- cuBLAS picks among its workspaces unless it is told how many there are.
- The embedding's gradient, sums and norms are without atomics. Those of `model/kernels/` count in integers.
- DeepSpeed's Triton products choose their tiles by time, and a restart may choose others: `expert_parallel` takes PyTorch's.
  Inductor then measures nothing that changes a sum either.
- NCCL's rings and trees add up in an order that their shape decides; switches that add up by themselves (NVLS) may not.
"""

from __future__ import annotations

import os

import torch

from data.cli import UserError

CUBLAS, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # the two that cuBLAS calls reproducible
NCCL, WITHOUT_SWITCHES = "NCCL_ALGO", "^NVLS,NVLSTree"


def enable() -> None:
    """In every rank, before it computes on its device or joins the others: cuBLAS and NCCL read their variables once.

    So no launcher has to take them to other hosts. What the user has set stays. Raises UserError where that is not reproducible.
    """
    if (chosen := os.environ.setdefault(CUBLAS, WORKSPACES[0])) not in WORKSPACES:
        raise UserError(f"--deterministic needs {CUBLAS} to be {' or '.join(WORKSPACES)}, not {chosen!r}; unset it")
    os.environ.setdefault(NCCL, WITHOUT_SWITCHES)
    torch.use_deterministic_algorithms(True)
    # Else every new tensor is filled with NaN, which shows what reads it too early and costs a pass over it (torchtitan's way too).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
