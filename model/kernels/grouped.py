"""Products of rows that lie by expert, for GPUs where PyTorch's grouped product is a loop that waits for the device.

A program makes one tile of a result, and finds out itself whose: the runs' ends are on the device, the host knows only how many
tiles there can be at most. Of two weights (gate and up) each tile takes the one it lies in, so that nobody joins them.

Shapes: R rows, E experts, A and B any widths, W weights (1 or 2) of `[E, B, A]` each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _place(tile, tall, across, TALL: tl.constexpr):
    """Row and column of a tile: down a column of TALL tiles, then the next. What runs at once then shares rows and weights in
    the L2 cache."""
    band = tile // (TALL * across)
    height = tl.minimum(tall - band * TALL, TALL)
    inside = tile - band * TALL * across
    return band * TALL + inside % height, inside // height


@triton.jit
def _run(ends, tile, across, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """`(expert, its tile, start, end)` of the whole grid's tile; beyond the last one the expert is none, at least E."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(end - start, ROWS) * across, 0)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    mine = e == expert
    before = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    return expert, tile - before, tl.sum(tl.where(mine, start, 0), axis=0), tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def product_kernel(
    x, ends, first, second, out, width, columns, E: tl.constexpr, EXPERTS: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
    TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`out[r, w * B + b] = sum over a of x[r, a] * weight_w[e, b, a]`; A is `width`, B `columns`."""
    each = tl.cdiv(columns, COLUMNS)
    expert, tile, start, end = _run(ends, tl.program_id(0), W * each, E, EXPERTS, ROWS)
    if expert >= E:
        return
    down, right = _place(tile, tl.cdiv(end - start, ROWS), W * each, TALL)
    w = right // each
    weight = tl.where(w == 0, first, second) + expert.to(tl.int64) * columns * width
    rows = start + down * ROWS + tl.arange(0, ROWS)
    cols = (right - w * each) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # What lies beyond the run or the columns is some row of theirs once more, and is not stored.
    x_at = x + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * width + k[None, :]
    weight_at = weight + tl.minimum(cols, columns - 1)[None, :] * width + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, width, DEPTH):
        if EVEN:
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            inside = begin + k < width
            a, b = tl.load(x_at, mask=inside[None, :], other=0.0), tl.load(weight_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at += DEPTH
        weight_at += DEPTH
    out_at = out + rows.to(tl.int64)[:, None] * (W * columns) + w * columns + cols[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (cols < columns)[None, :])


@triton.jit
def product_backward_kernel(
    dout, ends, first, second, dx, width, columns, E: tl.constexpr, EXPERTS: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
    TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`dx[r, a] = sum over w and b of dout[r, w * B + b] * weight_w[e, b, a]`; B is `width`, A `columns`. One sum for both."""
    across = tl.cdiv(columns, COLUMNS)
    expert, tile, start, end = _run(ends, tl.program_id(0), across, E, EXPERTS, ROWS)
    if expert >= E:
        return
    down, right = _place(tile, tl.cdiv(end - start, ROWS), across, TALL)
    rows = start + down * ROWS + tl.arange(0, ROWS)
    cols = right * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    dout_at = dout + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * (W * width) + k[None, :]
    of_expert = expert.to(tl.int64) * columns * width
    within = k[:, None] * columns + cols[None, :]
    steps = tl.cdiv(width, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, W * steps):
        w = tl.where(step < steps, 0, 1)
        begin = (step - w * steps) * DEPTH
        weight_at = tl.where(w == 0, first, second) + of_expert + begin * columns + within
        there = (cols < columns)[None, :]
        if EVEN:
            a, b = tl.load(dout_at + w * width + begin), tl.load(weight_at, mask=there, other=0.0)
        else:
            inside = begin + k < width
            a = tl.load(dout_at + w * width + begin, mask=inside[None, :], other=0.0)
            b = tl.load(weight_at, mask=inside[:, None] & there, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    dx_at = dx + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(dx_at, total.to(dx.dtype.element_ty), mask=(rows < end)[:, None] & (cols < columns)[None, :])


@triton.jit
def weight_gradient_kernel(
    dout, x, ends, first, second, width, columns, W: tl.constexpr,
    TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`dweight_w[e, b, a] = sum over the expert's r of dout[r, w * B + b] * x[r, a]`; B is `width`, A `columns`."""
    each, across = tl.cdiv(width, ROWS), tl.cdiv(columns, COLUMNS)
    tiles = W * each * across
    expert = tl.program_id(0) // tiles
    down, right = _place(tl.program_id(0) - expert * tiles, W * each, across, TALL)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    w = down // each
    rows = (down - w * each) * ROWS + tl.arange(0, ROWS)
    cols = right * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    dout_at = dout + (start + k).to(tl.int64)[None, :] * (W * width) + w * width + rows[:, None]
    x_at = x + (start + k).to(tl.int64)[:, None] * columns + cols[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(start, end, DEPTH):
        inside = begin + k < end
        a = tl.load(dout_at, mask=(rows < width)[:, None] & inside[None, :], other=0.0)
        b = tl.load(x_at, mask=inside[:, None] & (cols < columns)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        dout_at += DEPTH * W * width
        x_at += DEPTH * columns
    at = tl.where(w == 0, first, second) + expert.to(tl.int64) * width * columns + rows[:, None] * columns + cols[None, :]
    tl.store(at, total.to(first.dtype.element_ty), mask=(rows < width)[:, None] & (cols < columns)[None, :])


@dataclass(frozen=True)
class Tile:
    """ROWS x COLUMNS of a result, DEPTH of the sum at a time; its program's warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    reach: float  # of the largest tile's rate, once there is work for all; assumed, no GPU was at hand

    def cost(self, runs: int, length: int, columns: int, ragged: bool) -> float:
        """Of the time that the products take, as far as it depends on the tile: of the processor with the most programs. A ragged
        run's last tile is half empty, on average."""
        down = length / self.rows + 0.5 if ragged else math.ceil(length / self.rows)
        programs = runs * down * math.ceil(columns / self.columns)
        return math.ceil(programs / PROCESSORS) * self.rows * self.columns / self.reach

    def given(self) -> dict[str, int]:
        sizes = {"TALL": TALL, "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


#: An A100's.
PROCESSORS = 108
#: Rows of tiles that run at the same time, beside as many columns of them as there are: what they read stays in the L2 cache.
TALL = 8
#: Largest first. The first has the fewest bytes read for a product, the next more programs a processor, which fill each other's
#: gaps where sums are short, and the small ones little waste where an expert has few rows.
TILES = (
    Tile(128, 256, 64, 8, 3, reach=1.0),
    Tile(128, 128, 32, 4, 4, reach=0.95),
    Tile(64, 128, 32, 4, 4, reach=0.8),
    Tile(32, 128, 32, 4, 5, reach=0.5),
    Tile(16, 128, 64, 4, 4, reach=0.3),
)
#: Without tensor cores: exact sums of fp32, as PyTorch's products make them.
EXACT = Tile(64, 64, 32, 4, 3, reach=1.0)


@lru_cache(maxsize=4096)
def choose(runs: int, length: int, columns: int, dtype: torch.dtype, ragged: bool = True) -> Tile:
    """The tile for results of so many runs of that length on average. Nothing is measured: restarts choose the same."""
    if dtype == torch.float32:
        return EXACT
    return min(TILES, key=lambda tile: tile.cost(runs, length, columns, ragged))


def _grid(rows: int, experts: int, across: int, tile: Tile) -> tuple[int]:
    """At most so many tiles: each run may fill its last one with a single row."""
    return ((rows + experts * (tile.rows - 1)) // tile.rows * across,)


def _of_runs(ends_E: Tensor, width: int, tile: Tile) -> dict[str, int]:
    experts = ends_E.numel()
    return {"E": experts, "EXPERTS": triton.next_power_of_2(experts), "EVEN": width % tile.depth == 0, **tile.given()}


def product(x_RA: Tensor, ends_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`[R, W * B]`: of each row the products with its expert's matrices `[B, A]`, side by side."""
    (rows, width), (experts, columns, _), w = x_RA.shape, weights[0].shape, len(weights)
    out = x_RA.new_empty((rows, w * columns))
    if rows:
        tile = choose(experts, rows // experts, w * columns, x_RA.dtype)
        grid = _grid(rows, experts, w * triton.cdiv(columns, tile.columns), tile)
        product_kernel[grid](x_RA, ends_E, weights[0], weights[-1], out, width, columns, W=w, **_of_runs(ends_E, width, tile))
    return out


def product_backward(dout_RB: Tensor, ends_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`[R, A]`: the gradient of what `product` was given."""
    rows, (experts, width, columns), w = dout_RB.shape[0], weights[0].shape, len(weights)
    dx = dout_RB.new_empty((rows, columns))
    if rows:
        tile = choose(experts, rows // experts, columns, dout_RB.dtype)
        grid, more = _grid(rows, experts, triton.cdiv(columns, tile.columns), tile), _of_runs(ends_E, width, tile)
        product_backward_kernel[grid](dout_RB, ends_E, weights[0], weights[-1], dx, width, columns, W=w, **more)
    return dx


def weight_gradient(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor, weights: int) -> list[Tensor]:
    """Of each of so many weights `[E, B, A]`; of an expert without rows 0."""
    experts, width, columns = ends_E.numel(), dout_RB.shape[1] // weights, x_RA.shape[1]
    grads = [x_RA.new_empty((experts, width, columns)) for _ in range(weights)]
    tile = choose(experts * weights, width, columns, x_RA.dtype, ragged=False)
    grid = (experts * weights * triton.cdiv(width, tile.rows) * triton.cdiv(columns, tile.columns),)
    weight_gradient_kernel[grid](dout_RB, x_RA, ends_E, grads[0], grads[-1], width, columns, W=weights, **tile.given())
    return grads
