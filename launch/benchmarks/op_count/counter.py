"""Counts what a GPU would do for a piece of PyTorch, on `meta` tensors: nothing is computed and no GPU is needed.

Every operation that reaches the dispatcher is one entry: its floating-point operations, the bytes it has to read and write
(each input and output once, whatever caches do), the kernels it launches. What CUDA runs as one kernel and `meta` would
decompose (RMSNorm, flash attention, DeepSpeed's Triton kernels) is declared with `declare`, by shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import TorchDispatchMode

from launch.benchmarks.op_count import costs
from launch.benchmarks.op_count.live_bytes import LiveBytes

#: Kernels of one call where it is not one. A radix sort of 64-bit keys takes a histogram, a scan and passes; the others are
#: what PyTorch 2.13 launches on CUDA, read in aten/src/ATen/native/cuda: topk gathers and then sorts, an accumulating
#: `index_put_` sorts its indices and adds runs.
LAUNCHES = {"sort": 5, "argsort": 5, "topk": 2, "index_put_": 7, "index_put": 7, "cumsum": 1, "embedding_dense_backward": 6}
#: Allocations and views: no kernel, no bytes.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view", "set_"}
FREE |= {"lift_fresh", "_reshape_alias", "wait_tensor", "resize_"}
WRITES_ONLY = {"zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "fill_", "arange", "new_ones"}
GATHERS = {"index_select", "index", "gather", "embedding"}  # read as many rows as they return, not the whole source
SCATTERS = {"scatter_", "scatter", "index_copy_", "index_put_", "index_put", "scatter_add_", "index_add_", "index_add"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "addmm_"}
KINDS = {
    **dict.fromkeys(PRODUCTS, "matrix product"),
    **dict.fromkeys(("grouped_product", "grouped_product_backward", "grouped_weight_gradient"), "matrix product"),
    **dict.fromkeys(GATHERS | SCATTERS | {"embedding_dense_backward"}, "gather and scatter"),
    **dict.fromkeys(("norm", "norm_backward", "norm_rope", "norm_rope_backward"), "norm"),
    **dict.fromkeys(("spread", "collect", "combine", "weight_gradient"), "gather and scatter"),
    **dict.fromkeys(("sort", "argsort", "topk", "cumsum", "repeat_interleave", "bincount", "add_lift_"), "sort and count"),
    **dict.fromkeys(("copy_", "_to_copy", "cat", "clone", "stack", "contiguous"), "copy and cast"),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operation: where it belongs, what it does."""

    part: str
    kind: str
    name: str
    backward: bool
    flops: float = 0.0
    bytes: int = 0
    launches: int = 1
    sent: int = 0  # bytes to other ranks
    shape: tuple[int, ...] = ()  # of a product: rows, contraction, columns, groups


@dataclass
class OpCounts:
    """What was counted. Of the bytes that were alive, weights aside: those when the forward ended, the most before and after."""

    entries: list[Entry] = field(default_factory=list)
    host_waits: Counter[str] = field(default_factory=Counter)
    held: int = 0
    most_forward: int = 0
    most_backward: int = 0

    def total(self, what: str, kinds: Iterable[str] | None = None) -> float:
        chosen = None if kinds is None else set(kinds)
        return float(sum(getattr(e, what) for e in self.entries if chosen is None or e.kind in chosen))


class Count(TorchDispatchMode):
    """Counts all that runs inside it; `parts` says which module's share is whose, in forward and in backward alike."""

    current: Count | None = None
    #: Whether PyTorch's grouped product is that of a GPU where it `model.heuristics.is_loop`.
    looped = False

    def __init__(self, parts: dict[nn.Module, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = OpCounts()
        self.backward = False
        self._stack = ["other"]
        self._spans: list[tuple[int, int, int, str]] = []  # (sequence numbers from, to, depth, part)
        self._live = LiveBytes()
        self._hooks = [hook for module, part in (parts or {}).items() for hook in self._watch(module, part)]

    def __enter__(self) -> Count:
        Count.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        Count.current = None
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, part: str) -> Iterator[Any]:
        """Nodes that autograd makes between a module's start and end have sequence numbers between the two."""
        begun: list[int] = []

        def start(*_: Any) -> None:
            begun.append(_get_sequence_nr())
            self._stack.append(part)

        def stop(*_: Any) -> None:
            self._spans.append((begun.pop(), _get_sequence_nr(), len(self._stack), self._stack.pop()))

        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(stop)

    def part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None or not self.backward or len(self._stack) > 1:  # in a module: the forward, or its repetition
            return self._stack[-1]
        number = node._sequence_nr()
        around = [(depth, part) for first, last, depth, part in self._spans if first <= number < last]
        return max(around)[1] if around else "other"

    def end_forward(self) -> None:
        """The forward is over: what it left alive is what the backward needs."""
        self.counts.held = self._live.now
        self.backward = True

    def add(self, name: str, kind: str, **figures: Any) -> None:
        self.counts.entries.append(Entry(part=self.part(), kind=kind, name=name, backward=self.backward, **figures))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if func.namespace == "c10d":
            return self._exchange(func, name, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        outputs = tensors_of(out)
        if not func.is_view:  # whose storage is there already: a weight's, where it is turned over
            for tensor in outputs:
                self._follow(tensor)
        if (
            name not in FREE and not func.is_view and (outputs or func.namespace == "moe_gpt")
        ):  # which may only write into an argument
            self._count(name, func, args, tensors_of((args, kwargs or {})), outputs)
        return out

    def _count(self, name: str, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        kind = KINDS.get(name.removesuffix("_") if name not in KINDS else name, "elementwise and sums")
        inputs = read_by(func, inputs, outputs)
        if name in PRODUCTS:
            shape = product_shape(inputs)
            if name == "_grouped_mm" and self.looped:
                return self._run_by_run(shape, inputs, outputs)
            flops = 2.0 * shape[0] * shape[1] * shape[2]
            return self.add(name, kind, flops=flops, bytes=moved(inputs, outputs), shape=shape)
        if func.namespace == "moe_gpt":
            launches, more = costs.kernels_and_bytes(name, args, outputs)
            product = costs.product_of(name, inputs)
            figures = {} if product is None else {"flops": 2.0 * math.prod(product[:3]), "shape": product}
            return self.add(name, kind, bytes=moved(inputs, outputs) + more, launches=launches, **figures)
        self.add(name, kind, bytes=bytes_of(name, func, inputs, outputs), launches=LAUNCHES.get(name, 1))

    def _run_by_run(self, shape: tuple[int, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """torch's `_grouped_mm_fallback`: the runs' ends are copied to the host, which waits for them, and each run is a plain
        product; their lengths are taken as even. What the wait costs is not counted."""
        rows, width, columns, groups = shape
        ends = inputs[-1]
        self.add("copy_", KINDS["copy_"], bytes=size(ends))
        self.counts.host_waits["ends of the runs"] += 1
        each = (rows // groups, width) if outputs[0].ndim == 2 else (rows, width // groups)
        figures = {"flops": 2.0 * rows * width * columns / groups, "bytes": (moved(inputs, outputs) - size(ends)) // groups}
        for _ in range(groups):
            self.add("mm", KINDS["mm"], **figures, shape=(*each, columns, 1))

    def _exchange(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        whole, ranks = max((size(t) for t in tensors_of((args, kwargs))), default=0), torch.distributed.get_world_size()
        sent = whole * (ranks - 1) // ranks if "alltoall" in name else whole  # an even share stays here
        self.add(name, "all-to-all" if "alltoall" in name else "collective", bytes=2 * whole, sent=sent)
        return func(*args, **kwargs)

    def _follow(self, tensor: Tensor) -> None:
        self._live.follow(tensor)
        if self.backward:
            self.counts.most_backward = max(self.counts.most_backward, self._live.now)
        else:
            self.counts.most_forward = max(self.counts.most_forward, self._live.now)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Bytes that a pass over it touches: an expanded dimension is read once."""
    shape = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0]
    return torch.Size(shape).numel() * tensor.element_size()


def moved(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> int:
    return sum(map(size, inputs)) + sum(map(size, outputs))


def bytes_of(name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(map(size, outputs))
    if name in WRITES_ONLY:
        return written
    if name in GATHERS:
        return 2 * written + sum(size(t) for t in inputs if t.dtype in (torch.int64, torch.int32))
    if name in SCATTERS:
        given = sum(map(size, inputs[1:]))  # the first is written in place, only where the others say
        copied = 0 if name.endswith("_") else 2 * written
        values = max((size(t) for t in inputs[1:] if t.dtype == inputs[0].dtype), default=0)
        return given + copied + values * (2 if "add" in name else 1)
    if name == "copy_":
        return moved(inputs[1:], outputs)
    return moved(inputs, outputs)


def read_by(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Without `out=`, which is written, not read."""
    if any(a.alias_info is not None and a.alias_info.is_write and a.is_out for a in func._schema.arguments):
        return [t for t in inputs if all(t is not o for o in outputs)]
    return inputs


def product_shape(inputs: list[Tensor]) -> tuple[int, int, int, int]:
    """`(rows, contraction, columns, groups)`, rows over all groups; the first 16-bit or wider pair of matrices counts."""
    a, b = [t for t in inputs if t.is_floating_point() and t.ndim >= 2][-2:]
    if a.ndim == 2 and b.ndim == 3:  # grouped: rows by group
        return a.shape[0], a.shape[1], b.shape[2], b.shape[0]
    if a.ndim == 2 and b.ndim == 2 and len(inputs) > 2 and inputs[-1].dtype == torch.int32:  # grouped over the contraction
        return a.shape[0], a.shape[1], b.shape[1], inputs[-1].numel()
    if a.ndim == 3:
        return a.shape[0] * a.shape[1], a.shape[2], b.shape[2], a.shape[0]
    return a.shape[0], a.shape[1], b.shape[1], 1


def declare(
    name: str,
    kind: str,
    inputs: Iterable[Tensor | None],
    outputs: Iterable[Tensor],
    *,
    flops: float = 0.0,
    launches: int = 1,
    shape: tuple[int, ...] = (),
) -> None:
    """One kernel that CUDA has and `meta` has not. `inputs` and `outputs` are read and written once; `shape` is a product's, as in
    `Entry`."""
    if Count.current is not None:
        total = moved([t for t in inputs if t is not None], outputs)
        Count.current.add(name, kind, flops=flops, launches=launches, bytes=total, shape=shape)


def declare_host_wait(where: str) -> None:
    if Count.current is not None:
        Count.current.counts.host_waits[where] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """For the shapes of a declared kernel's results."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield
