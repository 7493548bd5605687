"""The flash kernels there are, each as one forward and one backward with the same arguments.

Shapes: dense q, k, v, out are [B, S, N or M, D] with lse [B, N, S]; with documents they are [T, N or M, D] with lse
[N, T], T = B * S. lse is the fp32 logsumexp of each query's scaled scores.

Signatures read at flash-attention 2.7.0 to 2.8.3 and commit 0251105a (flash-attn 3 and 4), and in torch 2.13's
`torch/nn/attention/varlen.py`. Modules are imported by name, so that an exported model does not ask for them.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Spans:
    """What a query may see. Dense where `lengths` is None; else the lengths of the packed documents."""

    scale: float
    causal: bool = True
    lengths: tuple[int, ...] | None = None
    cumulative: Tensor | None = None  # int32 [documents + 1] on the kernel's device

    @property
    def longest(self) -> int:
        return max(self.lengths or (0,))


Forward = Callable[[Tensor, Tensor, Tensor, Spans], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class FlashKernel:
    """forward(q, k, v, spans) -> out, lse, state; backward(dout, q, k, v, out, lse, spans, state) -> dq, dk, dv."""

    name: str
    forward: Forward
    backward: Backward


def _cpu_one(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, spans.causal, scale=spans.scale)
    return out.transpose(1, 2), lse


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    if spans.lengths is None:
        return *_cpu_one(q, k, v, spans), ()
    # One call per document. At 16 x 256 tokens in documents of 100 a block mask takes as long as plain causal
    # attention (bf16 26 ms, fp32 27 ms) and the calls 41 and 23 ms; from 1,024 tokens on the calls win.
    documents = zip(*(x.unsqueeze(0).split(spans.lengths, dim=1) for x in (q, k, v)), strict=True)
    parts = [_cpu_one(q_one, k_one, v_one, spans) for q_one, k_one, v_one in documents]
    outs, lses = zip(*parts, strict=True)
    return torch.cat([o[0] for o in outs]), torch.cat([lse[0] for lse in lses], dim=1), ()


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, _state: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    def one(rows: list[Tensor], lse_BNS: Tensor) -> list[Tensor]:
        args = [x.transpose(1, 2) for x in rows]
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, lse_BNS, 0.0, spans.causal, scale=spans.scale)
        return [g.transpose(1, 2) for g in grads]

    if spans.lengths is None:
        dq, dk, dv = one([dout, q, k, v, out], lse)
        return dq, dk, dv
    rows = zip(*(x.split(spans.lengths) for x in (dout, q, k, v, out)), strict=True)
    documents = zip(rows, lse.split(spans.lengths, dim=1), strict=True)
    grads = [one([x.unsqueeze(0) for x in row], part.unsqueeze(0)) for row, part in documents]
    dq, dk, dv = (torch.cat([g[0] for g in parts]) for parts in zip(*grads, strict=True))
    return dq, dk, dv


def _cpu() -> FlashKernel:
    return FlashKernel("PyTorch's CPU flash kernel", _cpu_forward, _cpu_backward)


def _torch_cuda() -> FlashKernel:
    """PyTorch's built-in FlashAttention-2; GQA without copies, dense and varlen."""

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        longest_q, longest_k = (q.shape[1], k.shape[1]) if spans.lengths is None else (spans.longest, spans.longest)
        out, lse, rng, unused, _ = aten._flash_attention_forward(
            *(q, k, v, spans.cumulative, spans.cumulative, longest_q, longest_k),
            *(0.0, spans.causal, False),
            scale=spans.scale,
        )
        return out, lse, (rng, unused)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        longest_q, longest_k = (q.shape[1], k.shape[1]) if spans.lengths is None else (spans.longest, spans.longest)
        return aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, spans.cumulative, spans.cumulative, longest_q, longest_k),
            *(0.0, spans.causal, *state),
            scale=spans.scale,
        )

    return FlashKernel("PyTorch's CUDA flash kernel", forward, backward)


def _flash_attn_2() -> FlashKernel:
    """The flash-attn package, 2.7 or newer."""
    fa = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        settings = (0.0, spans.scale, spans.causal)
        no_window_softcap_alibi = (-1, -1, 0.0, None)
        if spans.lengths is None:
            out, lse, _, rng = fa._flash_attn_forward(q, k, v, *settings, *no_window_softcap_alibi, False)
        else:
            cumulative = (spans.cumulative, spans.cumulative, spans.longest, spans.longest)
            out, lse, _, rng = fa._flash_attn_varlen_forward(q, k, v, *cumulative, *settings)
        return out, lse, (rng,)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # dropout, scale, causal, window left and right, softcap, alibi, deterministic, rng
        settings = (0.0, spans.scale, spans.causal, -1, -1, 0.0, None, False, *state)
        if spans.lengths is None:
            fa._flash_attn_backward(dout, q, k, v, out, lse, *grads, *settings)
        else:
            cumulative = (spans.cumulative, spans.cumulative, spans.longest, spans.longest)
            fa._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *cumulative, *settings)
        return grads

    version = importlib.import_module("flash_attn").__version__
    return FlashKernel(f"flash-attn {version}", forward, backward)


def _flash_attn_3() -> FlashKernel:
    """flash-attn 3 (the `hopper` build). It has no sinks of its own; ours need none."""
    fa = importlib.import_module("flash_attn_interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        varlen = {} if spans.lengths is None else _varlen_keywords(spans)
        out, lse, *_ = fa._flash_attn_forward(q, k, v, softmax_scale=spans.scale, causal=spans.causal, **varlen)
        return out, lse, ()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, _state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        longest = None if spans.lengths is None else spans.longest
        # By position: releases differ in the keyword's name (`causal`, `is_causal`).
        cumulative = (spans.cumulative, spans.cumulative, None, None, longest, longest)
        fa._flash_attn_backward(dout, q, k, v, out, lse, *cumulative, *grads, spans.scale, spans.causal)
        return grads

    return FlashKernel("flash-attn 3", forward, backward)


def _flash_attn_4() -> FlashKernel:
    """flash-attn 4 (CuTe). Its own `learnable_sink` has a backward on sm90, sm100 and sm110 only; the rule needs none."""
    fa = importlib.import_module("flash_attn.cute.interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        varlen = {} if spans.lengths is None else _varlen_keywords(spans)
        result = fa._flash_attn_fwd(q, k, v, softmax_scale=spans.scale, causal=spans.causal, return_lse=True, **varlen)
        return result[0], result[1], ()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, _state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        varlen = {} if spans.lengths is None else _varlen_keywords(spans)
        return fa._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=spans.scale, causal=spans.causal, **varlen)[:3]

    return FlashKernel("flash-attn 4", forward, backward)


def _varlen_keywords(spans: Spans) -> dict[str, Any]:
    return {
        "cu_seqlens_q": spans.cumulative,
        "cu_seqlens_k": spans.cumulative,
        "max_seqlen_q": spans.longest,
        "max_seqlen_k": spans.longest,
    }


LOADERS: dict[str, Callable[[], FlashKernel]] = {
    "cpu": _cpu,
    "torch": _torch_cuda,
    "flash_attn_2": _flash_attn_2,
    "flash_attn_3": _flash_attn_3,
    "flash_attn_4": _flash_attn_4,
}
MODULES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}


def preference(device_type: str, dtype: torch.dtype, head_dim: int, compute_capability: int) -> tuple[str, ...]:
    """Names in `LOADERS` of the kernels that fit, best first; `compute_capability` as 80, 90, 100, and 0 for the CPU.

    Empty where no flash kernel takes such tensors (fp32 on CUDA): `sdpa` is then used.
    """
    if device_type == "cpu":
        return ("cpu",)
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return ()
    if compute_capability < 80:
        return ()
    newest = {9: ("flash_attn_3", "flash_attn_4"), 10: ("flash_attn_4",), 11: ("flash_attn_4",)}
    return (*newest.get(compute_capability // 10, ()), "flash_attn_2", "torch")


@lru_cache
def load_kernel(name: str) -> FlashKernel | None:
    """The kernel, or None where its package is missing or does not load (built for another torch, mostly)."""
    module = MODULES.get(name)
    try:
        if module is not None and importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # its package is not there at all
        return None
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("%s is installed but does not load, so it is not used: %s", module, error)
        return None
    try:
        return LOADERS[name]()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("%s is installed but does not load, so it is not used: %s", module, error)
        return None


@lru_cache
def pick_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> FlashKernel | None:
    """The best flash kernel present for such tensors, logged once; None where only `sdpa` is left."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    names = preference(device.type, dtype, head_dim, capability[0] * 10 + capability[1])
    kernel = next((found for name in names if (found := load_kernel(name)) is not None), None)
    logger.info("attention on %s in %s: %s", device, dtype, kernel.name if kernel else "PyTorch's sdpa")
    return kernel
