"""Run by `test_grouped_kernel.py`, under Triton's interpreter or on a GPU: the grouped products' kernels beside each expert's own
product in float64, outputs and gradients.

Prints one JSON object: `errors`, the relative error by case; `loops`, under the interpreter, that of each loop when it stops too
early; `chosen`, tiles by the rows of an expert; `asked`, by what the products choose theirs. `--gpu` takes bf16 too, whose products
the interpreter makes of the numbers' bits, and the sizes of `800m` and `4b`.
"""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from unittest import mock

import torch
from kernel_loops import Loops
from torch import Tensor

from model import MoEGPTConfig, grouped, operators
from model.dispatch import grouped_linears
from model.kernels import grouped as kernels
from model.kernels.grouped import EXACT, TILES, Tile
from model.moe import MoE

#: So small that every result is several tiles high and wide, in several bands, and every sum takes several steps.
SMALL, BAND = Tile(32, 32, 32, 4, 2, reach=1.0), 2
RUNS = {
    "ragged": [70, 5, 100],
    "whole tiles": [32, 64, 96],
    "empty experts": [0, 33, 0, 0, 21, 0],
    "all to the last": [0, 0, 70],
    "one row": [0, 1, 0, 0, 0],
    "no rows": [0, 0],
}


def formula(x: Tensor, ends: Tensor, *weights: Tensor) -> tuple[Tensor]:
    """One expert after the other."""
    runs = [x[a:b] for a, b in pairwise([0, *ends.tolist()])]
    return (torch.cat([torch.cat([rows @ w[e].T for w in weights], dim=1) for e, rows in enumerate(runs)]),)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    found = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def compare(counts: Sequence[int], width: int, columns: int, weights: int, dtype: torch.dtype) -> float:
    """Of output, input gradient and every weight's gradient the largest relative error."""
    torch.manual_seed(0)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    shapes = [(sum(counts), width), *[(len(counts), columns, width)] * weights]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    (out,), (want,) = grouped_linears(inputs[0], ends, *inputs[1:]), formula(doubles[0], ends, *doubles[1:])
    dout = torch.randn(want.shape, dtype=dtype)
    ours = [out, *torch.autograd.grad(out, inputs, dout)]
    plain = [want, *torch.autograd.grad(want, doubles, dout.double())]
    empty = torch.tensor([count == 0 for count in counts])
    assert not any(gradient[empty].any() for gradient in ours[2:])
    return max(error(a.detach(), b.detach()) for a, b in zip(ours, plain, strict=True))


def small_cases(dtype: torch.dtype) -> dict[str, float]:
    found = {name: compare(counts, 80, 48, 2, dtype) for name, counts in RUNS.items()}
    many = torch.arange(33) % 5 * 3
    return {
        **found,
        "one weight": compare([20, 75], 80, 48, 1, dtype),
        "no part of a tile": compare([64, 32], 64, 64, 2, dtype),
        "33 experts": compare(many.tolist(), 16, 16, 1, dtype),
    }


def by_tiles(dtype: torch.dtype) -> dict[str, float]:
    """Every tile that may be chosen, at sizes that it does not divide."""
    found = {}
    for tile in TILES if dtype != torch.float32 or not on_gpu() else (EXACT,):
        with mock.patch.object(kernels, "choose", lambda *_, tile=tile, **__: tile):
            found[f"{tile.rows} x {tile.columns}"] = compare([0, tile.rows + 3, 5], tile.depth + 16, tile.columns + 16, 1, dtype)
    return found


def real_cases(dtype: torch.dtype) -> dict[str, float]:
    """A layer of `800m` and of `4b`, experts of a rank under EP 1 and EP 4, unevenly loaded."""
    found = {}
    for name in ("800m", "4b"):
        config = MoEGPTConfig.preset(name)
        hidden, width = config.hidden_size, config.moe_intermediate_size
        for counts in ([1000, 0, 2100, 517, 60, 333, 1, 85], [2500, 1596], [30, 2, 0, 0, 11, 5, 9, 7]):
            found[f"{name}, {counts}, gate and up"] = compare(counts, hidden, width, 2, dtype)
            found[f"{name}, {counts}, down"] = compare(counts, width, hidden, 1, dtype)
    return found


def stays_apart(dtype: torch.dtype) -> float:
    """What is not finite in one expert's rows and gradients, or beyond all runs' ends, reaches no other expert."""
    counts = [20, 21, 19]
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    x, weights = torch.randn(60, 48, dtype=dtype), [torch.randn(3, 16, 48, dtype=dtype).requires_grad_() for _ in range(2)]
    x[20:41] = torch.nan
    x.requires_grad_()
    (out,) = grouped_linears(x, ends, *weights)
    dx, *dweights = torch.autograd.grad(out, [x, *weights], torch.randn_like(out))
    assert not dx.isnan().any() and out[20:41].isnan().all() and not out[:20].isnan().any() and not out[41:].isnan().any()
    assert all([bool(part.isnan().any()) for part in gradient] == [False, True, False] for gradient in dweights)
    return 0.0


def mixture(dtype: torch.dtype) -> float:
    """A whole mixture's output and gradients, as one graph with the kernels' operators, and in plain PyTorch."""
    torch.manual_seed(2)
    moe = MoE(
        MoEGPTConfig.preset("tiny", hidden_size=32, moe_intermediate_size=32, n_routed_experts=4, n_group=1, topk_group=1)
    ).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    results = []
    for kind in (dtype, torch.float64):
        moe.to(kind).zero_grad()
        given = x.to(kind, copy=True).requires_grad_()
        out = (torch.compile(moe, backend="aot_eager", fullgraph=True) if kind == dtype else moe)(given)
        out.square().sum().backward()
        results.append([out.detach(), given.grad, *(p.grad.clone() for p in moe.parameters() if p.grad is not None)])
    return max(map(error, *results))


def loops_that_matter() -> dict[str, float]:
    """Of each kernel's loop the error when it stops after its first trip."""
    loops = Loops([kernels])
    found = {}
    for loop in loops.names.values():
        loops.cut = loop
        found[loop] = compare([0, 40, 5], 48, 48, 2, torch.float32)
    loops.cut = ""
    return found


def chosen() -> dict[str, list[int]]:
    """Rows and columns of the tile for gate and up of `800m`, by an expert's rows; and where each has just so many."""
    tiles = {str(rows): kernels.choose(8, rows, 1024, torch.bfloat16) for rows in (1, 30, 50, 384, 512, 4096)}
    tiles["384, none ragged"] = kernels.choose(8, 384, 1024, torch.bfloat16, ragged=False)
    tiles["512, float32"] = kernels.choose(8, 512, 1024, torch.float32)
    return {name: [tile.rows, tile.columns] for name, tile in tiles.items()}


def asked() -> list[list[int | bool]]:
    """By what a product's tile, its input gradient's and its weights' are chosen: runs, their length, columns, whether ragged."""
    with mock.patch.object(kernels, "choose", return_value=SMALL) as choose:
        compare([32, 64], 80, 48, 2, torch.float32)
    return [[*call.args[:3], call.kwargs.get("ragged", True)] for call in choose.call_args_list]


def on_gpu() -> bool:
    return "--gpu" in sys.argv


def main() -> None:
    torch.set_default_device("cuda" if on_gpu() else "cpu")
    operators.fits = lambda x: x.dtype != torch.float64
    grouped.lacks_grouped_mm = lambda device: True  # a newer GPU too: the kernel's numbers are wanted
    calls = mock.Mock(wraps=kernels.product), mock.Mock(wraps=kernels.product_backward), mock.Mock(wraps=kernels.weight_gradient)
    kernels.product, kernels.product_backward, kernels.weight_gradient = calls
    found, loops = {}, {}
    for dtype in (torch.float32, torch.bfloat16) if on_gpu() else (torch.float32,):
        with mock.patch.multiple(kernels, choose=lambda *_, **__: SMALL, TALL=BAND):
            cases = small_cases(dtype) | {"stays apart": stays_apart(dtype)}
            if not on_gpu():
                cases |= {"mixture": mixture(dtype)}
                loops = loops_that_matter()
        cases |= by_tiles(dtype) | (real_cases(dtype) if on_gpu() else {})
        found |= {f"{dtype}: {name}".removeprefix("torch."): value for name, value in cases.items()}
    assert all(call.call_count >= len(RUNS) for call in calls)
    json.dump({"errors": found, "loops": loops, "chosen": chosen(), "asked": asked()}, sys.stdout)


if __name__ == "__main__":
    main()
