"""Run by `test_triton_experts.py` under Triton's interpreter: the experts as a GPU before sm90 computes them without our kernels.

DeepSpeed's Triton kernels in fp32 beside each expert's own formula in float64, forward and gradients. Prints one JSON object: the
relative error by case, and which tensors the products keep for their backward.
"""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from triton.backends import backends

for backend in backends.values():  # DeepSpeed defines its kernels only where a GPU is
    backend.driver.is_active = staticmethod(lambda: True)

from launch.engine.expert_parallel import Experts  # noqa: E402
from model import dispatch  # noqa: E402

theirs: Any = import_module("deepspeed.ops.triton_ops.group_gemm_triton")  # whose package has a function of that name
HIDDEN, WIDTH = 40, 24
#: Ragged runs, more than a tile of 32 and less; experts without rows, first, last and between; all rows to one; no rows.
CASES = {"ragged": [3, 70, 0, 33], "empty first and last": [0, 5, 32, 0], "all to one": [0, 0, 90, 0], "none": [0, 0, 0, 0]}


def formula(x: Tensor, counts: list[int], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    parts = x.split(counts)
    return torch.cat([(F.silu(rows @ a.T) * (rows @ c.T)) @ b.T for rows, a, b, c in zip(parts, w1, w2, w3, strict=True)])


def error(got: Tensor, want: Tensor) -> float:
    found = float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))
    return found if found == found else float("inf")  # which a maximum cannot miss


def joined(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """As on a GPU, where it pays."""
    return [torch.cat(tuple(weights), dim=1)]


def compare(counts: list[int]) -> tuple[float, list[bool]]:
    torch.manual_seed(sum(counts))
    experts = Experts(HIDDEN, WIDTH, len(counts), use_grouped_mm=True)
    experts.use_triton_grouped_mm = True  # as DeepSpeed's accelerator says there
    weights = [experts.w1, experts.w2, experts.w3]
    for weight in weights:
        torch.nn.init.normal_(weight)
    x, dout = torch.randn(sum(counts), HIDDEN, requires_grad=True), torch.randn(sum(counts), HIDDEN)
    kept: list[Any] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = experts(x, torch.tensor(counts))
    ours = [out, *torch.autograd.grad(out, [x, *weights], dout)]
    doubles = [t.detach().double().requires_grad_() for t in (x, *weights)]
    wanted = formula(doubles[0], counts, *doubles[1:])
    plain = [wanted, *torch.autograd.grad(wanted, doubles, dout.double())]
    # a weight has three dimensions: each that is kept is one of the three, not a copy
    originals = [any(tensor is weight for weight in weights) for tensor in kept if tensor.ndim == 3]
    return max(map(error, ours, (x.detach() for x in plain))), originals


def main() -> None:
    for kernel in (theirs._group_gemm_kernel, theirs._group_gemm_dw_kernel):
        kernel.configs = kernel.configs[:1]  # with several it would measure which is the fastest
    found = {f"{name}, apart": compare(counts) for name, counts in CASES.items()}
    dispatch.joined = joined
    found |= {f"{name}, joined": compare(counts) for name, counts in CASES.items()}
    json.dump({"errors": {k: v[0] for k, v in found.items()}, "originals": {k: v[1] for k, v in found.items()}}, sys.stdout)


if __name__ == "__main__":
    main()
