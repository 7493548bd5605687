"""What a GPU runs as one kernel, declared for `meta` tensors: otherwise PyTorch's decomposition of it would be counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.module_inject import auto_ep_layer
from deepspeed.moe import ep_kernels
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import Tensor
from torch.nn import functional as F

from launch.benchmarks.op_count.counter import Count, declare, declare_host_wait, uncounted
from launch.engine.exchange import Exchange
from model.flash import FlashOutput
from model.heuristics import is_loop

#: Its package has a function of the same name.
group_gemm = import_module("deepspeed.ops.triton_ops.group_gemm_triton")


class FusedNorm(torch.autograd.Function):
    """CUDA's `_fused_rms_norm`: one kernel that keeps x and 1/rms; the backward reads twice, for dx and for dweight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with uncounted():
            out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        declare("_fused_rms_norm", "norm", [x, weight], [out, rstd])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, rstd = ctx.saved_tensors
        with uncounted():
            dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        declare("_fused_rms_norm_backward: dx", "norm", [dout, x, rstd, weight], [dx])
        declare("_fused_rms_norm_backward: dweight", "norm", [dout, x, rstd], [dweight], launches=2)
        return dx, dweight


def attention_flops(q: Tensor, k: Tensor) -> float:
    """Causal: two products over half of the keys."""
    batch, queries, heads, dim = q.shape
    return 2.0 * batch * queries * k.shape[1] * heads * dim


class CountedFlash:
    """A flash kernel's shape: reads q, k, v, writes out and lse; the backward's FLOPs as MFU counts them, twice the forward's."""

    name = "counted"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> FlashOutput:
        with uncounted():
            out, lse = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        declare("flash forward", "attention", [q, k, v], [out, lse], flops=attention_flops(q, k))
        return FlashOutput(out, lse, ())

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: FlashOutput, mask: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with uncounted():
            grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # rowsum(dout * out) first; dq is summed in fp32 and cast
        declare("flash backward: sums", "attention", [dout, saved.out], [saved.lse])
        declare(
            "flash backward", "attention", [dout, q, k, v, saved.lse], [*grads, q, q], flops=2 * attention_flops(q, k), launches=2
        )
        return grads


class FlashFunction(torch.autograd.Function):
    """`scaled_dot_product_attention` of `[B, N, S, D]` by a flash kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, _ = CountedFlash().forward(q, k, v, None, 1.0)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = CountedFlash().backward(dout.transpose(1, 2), q, k, v, FlashOutput(out, lse, ()), None, 1.0)
        return tuple(g.transpose(1, 2) for g in grads)


class TritonSwiGLU(torch.autograd.Function):
    """DeepSpeed's fused SwiGLU, one kernel in each direction."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        with uncounted():
            out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        ctx.save_for_backward(gate, up)
        declare("triton swiglu", "elementwise and sums", [gate, up], [out])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        with uncounted():
            dgate, dup = torch.empty_like(dout), torch.empty_like(dout)
        declare("triton swiglu backward", "elementwise and sums", [dout, gate, up], [dgate, dup])
        return dgate, dup


def counted_gather(rows: Tensor, index: Tensor) -> Tensor:
    """DeepSpeed's Triton gather: reads as many rows as it writes."""
    with uncounted():
        out = rows.new_empty((index.numel(), rows.shape[1]))
    declare("triton gather", "gather and scatter", [out, index], [out])
    return out


def counted_fill(counts: Tensor, starts: Tensor, offsets: Tensor, experts: int, ranks: int, max_len: int, **_: Any) -> Tensor:
    """DeepSpeed's Triton kernel of permutation indices, after a fill with -1."""
    with uncounted():
        out = torch.empty(max_len, dtype=torch.int32, device=counts.device)
    declare("triton fill indices", "sort and count", [], [out, out], launches=2)
    return out


class WeightedRestore(torch.autograd.Function):
    """DeepSpeed's `fused_weighted_sum`: rows, weighed and summed to tokens, one Triton kernel in each direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scores: Tensor, inverse: Tensor) -> Tensor:
        with uncounted():
            out = rows.new_empty((scores.shape[0], rows.shape[1]))
        ctx.save_for_backward(rows, scores, inverse)
        declare("triton weighted restore", "gather and scatter", [rows, scores, inverse], [out])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, scores, inverse = ctx.saved_tensors
        with uncounted():
            drows, dscores = torch.empty_like(rows), torch.empty_like(scores)
        declare("triton weighted restore backward", "gather and scatter", [dout, rows, scores, inverse], [drows, dscores])
        return drows, dscores, None


def counted_restore(rows: Tensor, top_scores: Tensor, token_indices_sorted: Tensor, top_k: int, shape: Any) -> Tensor:
    """`fused_weighted_sum` whole: the permutation inverted by a kernel of its own first."""
    inverse = torch.empty(token_indices_sorted.shape, dtype=torch.int32, device=rows.device)
    declare("triton invert index", "gather and scatter", [token_indices_sorted], [inverse])
    return WeightedRestore.apply(rows, top_scores, inverse).view(shape)  # type: ignore[no-untyped-call, no-any-return]


def counted_group_gemm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """DeepSpeed's Triton product by expert, its programs told by a kernel before it where runs start and how long they are."""
    (count, width), (experts, _, columns) = rows.shape, weight.shape
    out = rows.new_empty((count, columns))
    declare("triton group meta", "sort and count", [ends], [ends, ends])
    shape = (count, width, columns, experts)
    flops = 2.0 * count * width * columns
    declare("triton group gemm", "matrix product", [rows, weight, ends, ends], [out], flops=flops, shape=shape)
    return out


def counted_grouped_dw(a: Tensor, grad: Tensor, ends: Tensor, experts: int) -> Tensor:
    """The same for the weights' gradient: of each expert `a^T grad` over its run."""
    (count, height), columns = a.shape, grad.shape[1]
    out = a.new_empty((experts, height, columns))
    declare("triton group meta", "sort and count", [ends], [ends, ends])
    shape = (height, count, columns, experts)
    flops = 2.0 * count * height * columns
    declare("triton group gemm: weight", "matrix product", [a, grad, ends, ends], [out], flops=flops, shape=shape)
    return out


def prefers_triton(capability: tuple[int, int] | None) -> bool:
    """Whether AutoEP's experts take DeepSpeed's Triton product on a GPU of this compute capability, by DeepSpeed's own rule."""
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
        mock.patch("deepspeed.ops.triton_ops.is_triton_available", lambda: capability is not None),
    ):
        return bool(CUDA_Accelerator.prefer_triton_grouped_mm(None))


def start_split_plan(layer: Any, counts: Tensor) -> Any:
    """`async_split_plan`: the counts are on their way before the rows are packed."""
    return exchanged_counts(counts, layer.ep_size, layer.num_local_experts, layer.ep_group)


def wait_for_split_plan(_layer: Any, received: Tensor) -> Any:
    declare_host_wait("split plan, behind the rows' gather")
    return even_plan(received)


def exchanged_counts(counts: Tensor, ep_size: int, local: int, group: Any) -> Tensor:
    matrix = counts.view(ep_size, local)
    received = torch.empty_like(matrix)
    dist.all_to_all_single(received.view(-1), matrix.reshape(-1), group=group)
    torch.stack((matrix.sum(dim=1), received.sum(dim=1)))
    return received


def counted_split_plan(counts: Tensor, ep_size: int, local: int, group: Any) -> Any:
    """AutoEP's split plan: counts exchanged, then the host waits. The shares are taken as even."""
    received = exchanged_counts(counts, ep_size, local, group)
    declare_host_wait("split plan")
    return even_plan(received)


def even_plan(received: Tensor) -> Any:
    return auto_ep_layer.SplitPlan(*even_shares(counted_split_plan.rows, received.shape[0]), received)  # type: ignore[attr-defined]


def even_shares(rows: int, ranks: int) -> tuple[list[int], list[int]]:
    return [rows // ranks] * ranks, [rows // ranks] * ranks


@contextmanager
def as_on_cuda(rows: int, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """While open, `meta` tensors take the ways that CUDA tensors take on a GPU of this compute capability, None: one where PyTorch
    has a kernel for grouped products; `rows` are routed from each rank."""

    def wait(exchange: Exchange) -> None:
        declare_host_wait("split sizes, behind the shared expert")
        exchange.sizes = even_shares(rows, exchange.sent_PL.shape[0])

    def copied(exchange: Exchange) -> tuple[Tensor, Any]:
        return torch.stack((exchange.sent_PL.sum(dim=1), exchange.received_PL.sum(dim=1))), None

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call, no-any-return]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return FlashFunction.apply(q, k, v)  # type: ignore[no-untyped-call, no-any-return]

    def fused_swiglu(gate: Tensor, up: Tensor, *_: Any, **__: Any) -> Tensor:
        return TritonSwiGLU.apply(gate, up)  # type: ignore[no-untyped-call, no-any-return]

    counted_split_plan.rows = rows  # type: ignore[attr-defined]
    patches: list[tuple[Any, str, Any]] = [
        (F, "rms_norm", norm),
        (F, "scaled_dot_product_attention", sdpa),
        (Exchange, "wait_for_counts", wait),
        (Exchange, "_copy_to_host", copied),
        (auto_ep_layer, "_split_plan_from_expert_counts", counted_split_plan),
        (auto_ep_layer.AutoEPMoELayer, "_start_async_split_plan", start_split_plan),
        (auto_ep_layer.AutoEPMoELayer, "_wait_async_split_plan", wait_for_split_plan),
        (auto_ep_layer.fused_token_ops, "fused_weighted_restore", counted_restore),
        (ep_kernels, "fill_indices_wrapper", counted_fill),
        (ep_kernels, "gather_rows", counted_gather),
        (ep_kernels, "permute_rows_supported", lambda tensor: True),
        (auto_ep_layer.fused_token_ops, "assert_supported", lambda *a, **k: None),
        (group_gemm, "_validate", lambda *a, **k: None),  # which asks for Triton
        (group_gemm, "_group_gemm", counted_group_gemm),
        (group_gemm, "_grouped_dw", counted_grouped_dw),
        (checkpointing, "copy_to_device", lambda tensors, *a, **k: tensors),  # of `full`: they are there
    ]
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch("model.attention.pick_kernel", lambda *_: CountedFlash()))
        stack.enter_context(mock.patch("model.operators.fits", lambda _: True))
        looped = capability is not None and is_loop(capability[0])
        stack.enter_context(mock.patch.object(Count, "looped", looped))
        stack.enter_context(mock.patch("model.grouped.lacks_grouped_mm", lambda _: looped))
        stack.enter_context(mock.patch("deepspeed.moe.ep_experts.apply_expert_activation", fused_swiglu))
        yield
