"""The flash kernels behind one signature: forward(q, k, v) and backward of (dout, q, k, v, out, lse).

Shapes: dense q, k, v, out are [B, S, N or M, D] with lse [B, N, S]; packed documents (`mask.seqlens`) are [T, N or M, D] with
lse [N, T], T = B * S. lse is the fp32 logsumexp of each query's scaled scores. Dropout, windows, soft caps, ALiBi and fp8
scales are arguments of these packages that this model never uses; each is written out by its name.

How a kernel comes to be used: `pick_kernel` asks `kernel_preference` for the names that fit the device, dtype and head size,
best first, and takes the first that `load_kernel` can import. `model/sinks.py` calls it.

Backwards on GPUs add up dq by atomics, in whatever order the blocks come, unless `torch.use_deterministic_algorithms(True)` is
on: PyTorch's own kernel then looks for itself, flash-attn 2 is told, and the others, of which some releases do not keep the
promise, are passed over. Forwards have no atomics.

Signatures read at flash-attention 2.7.0 to 2.8.3 and commit 0251105a (flash-attn 3 and 4), and in torch 2.13's
`torch/nn/attention/varlen.py`. Packages are imported by name and late, so a machine without them needs nothing.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .mask import AttentionMask

logger = logging.getLogger(__name__)
aten: Any = torch.ops.aten

NO_DROPOUT = 0.0
NO_SOFTCAP = 0.0
NO_WINDOW = -1  # to the left or right: unlimited
NO_ALIBI = None
NO_DEBUG_MASK = False

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashOutput(NamedTuple):
    """state: what the kernel's own backward wants back (dropout's random state, which CUDA kernels insist on)."""

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, ...] = ()


class FlashKernel(Protocol):
    """`mask` is plain causal, one query over all keys, or packed documents: what `flash_attention` lets through."""

    name: str
    traceable: bool  # by dynamo: PyTorch's own operator, or one that the package registered
    deterministic: bool  # its backward can add up in an order of its own

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients: ...


def is_causal(mask: AttentionMask) -> bool:
    """One query after a cache looks at every key; a kernel's causal flag would align it with the first."""
    return mask.queries > 1


def _varlen_keywords(mask: AttentionMask) -> dict[str, Any]:
    """flash-attn 3's and 4's names; queries and keys are the same documents."""
    if mask.seqlens is None:
        return {}
    return {
        "cu_seqlens_q": mask.cu_seqlens,
        "cu_seqlens_k": mask.cu_seqlens,
        "max_seqlen_q": mask.max_seqlen,
        "max_seqlen_k": mask.max_seqlen,
    }


class CpuFlash:
    """PyTorch's flash kernel for CPUs. It takes [B, N, S, D] and knows no documents, so each is a call of its own.

    At 16 x 256 tokens in documents of 100 a block mask takes as long as plain causal attention (bf16 26 ms, fp32 27 ms) and
    the calls 41 and 23 ms; from 1,024 tokens on the calls win.
    """

    name = "PyTorch's CPU flash kernel"
    traceable = True
    deterministic = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput:
        if mask.seqlens is None:
            return FlashOutput(*self._forward(q, k, v, mask, scale))
        documents = zip(*(x.unsqueeze(0).split(mask.seqlens, dim=1) for x in (q, k, v)), strict=True)
        parts = [self._forward(one_q, one_k, one_v, mask, scale) for one_q, one_k, one_v in documents]
        outs, lses = zip(*parts, strict=True)
        return FlashOutput(torch.cat([out_1SND[0] for out_1SND in outs]), torch.cat([lse_1NS[0] for lse_1NS in lses], dim=1))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, NO_DROPOUT, is_causal(mask), scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients:
        rows = (dout, q, k, v, output.out)
        if mask.seqlens is None:
            return self._backward(rows, output.lse, mask, scale)
        documents = zip(*(x.unsqueeze(0).split(mask.seqlens, dim=1) for x in rows), strict=True)
        lses = output.lse.unsqueeze(0).split(mask.seqlens, dim=2)
        parts = [self._backward(document, lse_1NS, mask, scale) for document, lse_1NS in zip(documents, lses, strict=True)]
        dq, dk, dv = (torch.cat([gradient[0] for gradient in one_input]) for one_input in zip(*parts, strict=True))
        return dq, dk, dv

    def _backward(self, rows: tuple[Tensor, ...], lse: Tensor, mask: AttentionMask, scale: float) -> Gradients:
        heads_first = (x.transpose(1, 2) for x in rows)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, lse, NO_DROPOUT, is_causal(mask), scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class TorchCudaFlash:
    """PyTorch's built-in FlashAttention-2; GQA without copies, dense and varlen."""

    name = "PyTorch's CUDA flash kernel"
    traceable = True
    deterministic = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput:
        cu, longest_q, longest_k = mask.cu_seqlens, *self._longest(q, k, mask)
        out, lse, rng, unused, _ = aten._flash_attention_forward(
            q, k, v, cu, cu, longest_q, longest_k, NO_DROPOUT, is_causal(mask), NO_DEBUG_MASK, scale=scale
        )
        return FlashOutput(out, lse, (rng, unused))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients:
        (out, lse, (rng, unused)), cu = output, mask.cu_seqlens
        longest_q, longest_k = self._longest(q, k, mask)
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest_q, longest_k, NO_DROPOUT, is_causal(mask), rng, unused, scale=scale
        )
        return dq, dk, dv

    @staticmethod
    def _longest(q: Tensor, k: Tensor, mask: AttentionMask) -> tuple[int, int]:
        """Of the queries and of the keys."""
        return (q.shape[1], k.shape[1]) if mask.seqlens is None else (mask.max_seqlen, mask.max_seqlen)


class FlashAttn2:
    """The flash-attn package, 2.7 or newer."""

    traceable = True
    deterministic = True

    def __init__(self) -> None:
        self.package: Any = importlib.import_module("flash_attn.flash_attn_interface")
        self.name = f"flash-attn {importlib.import_module('flash_attn').__version__}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput:
        first = (NO_DROPOUT, scale, is_causal(mask))
        if mask.seqlens is None:
            rest = (NO_WINDOW, NO_WINDOW, NO_SOFTCAP, NO_ALIBI, NO_DEBUG_MASK)
            out, lse, _, rng = self.package._flash_attn_forward(q, k, v, *first, *rest)
        else:
            out, lse, _, rng = self.package._flash_attn_varlen_forward(q, k, v, *self._varlen(mask), *first)
        return FlashOutput(out, lse, (rng,))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients:
        out, lse, (rng,) = output
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)  # written in place
        unused = (NO_WINDOW, NO_WINDOW, NO_SOFTCAP, NO_ALIBI)
        settings = (NO_DROPOUT, scale, is_causal(mask), *unused, torch.are_deterministic_algorithms_enabled(), rng)
        if mask.seqlens is None:
            self.package._flash_attn_backward(dout, q, k, v, out, lse, *grads, *settings)
        else:
            self.package._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *self._varlen(mask), *settings)
        return grads

    @staticmethod
    def _varlen(mask: AttentionMask) -> tuple[Tensor | None, Tensor | None, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
        return mask.cu_seqlens, mask.cu_seqlens, mask.max_seqlen, mask.max_seqlen


class FlashAttn3:
    """flash-attn 3 (the `hopper` build). It has no sinks of its own; ours need none."""

    name = "flash-attn 3"
    deterministic = False  # 2.8.3 takes the argument and drops it; later ones keep it, for heads up to 192, with the same signature

    def __init__(self) -> None:
        self.package: Any = importlib.import_module("flash_attn_interface")
        # What serves a KV cache, rotary embeddings and fp8 has no default in older releases (2.8.3's sources).
        parameters = inspect.signature(self.package._flash_attn_forward).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        self.unused = dict.fromkeys(named[3:])  # after q, k, v
        self.traceable = isinstance(self.package._flash_attn_forward, CustomOpDef)  # not in 2.8.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput:
        keywords = {**self.unused, "softmax_scale": scale, "causal": is_causal(mask), **_varlen_keywords(mask)}
        out, lse, *_ = self.package._flash_attn_forward(q, k, v, **keywords)
        return FlashOutput(out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)  # written in place
        cu, used = mask.cu_seqlens, None  # `used`: how much of each sequence is filled, which a cache needs
        longest = None if mask.seqlens is None else mask.max_seqlen
        # By position: releases differ in the last keyword's name (`causal`, `is_causal`).
        self.package._flash_attn_backward(
            *(dout, q, k, v, output.out, output.lse),
            *(cu, cu, used, used, longest, longest),
            *grads,
            *(scale, is_causal(mask)),
        )
        return grads


class FlashAttn4:
    """flash-attn 4 (CuTe). Its own `learnable_sink` has a backward on sm90, sm100 and sm110 only; the rule needs none."""

    name = "flash-attn 4"
    traceable = False  # Python over CuTe's compiler
    deterministic = False  # its first betas cannot, later ones end on sm90, where grouped queries were mended last

    def __init__(self) -> None:
        self.package: Any = importlib.import_module("flash_attn.cute.interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> FlashOutput:
        keywords = {"softmax_scale": scale, "causal": is_causal(mask), **_varlen_keywords(mask)}
        out, lse, *_ = self.package._flash_attn_fwd(q, k, v, return_lse=True, **keywords)
        return FlashOutput(out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: FlashOutput, mask: AttentionMask, scale: float
    ) -> Gradients:
        keywords = {"softmax_scale": scale, "causal": is_causal(mask), **_varlen_keywords(mask)}
        # Not the order of the other packages: out comes before dout.
        dq, dk, dv, *_ = self.package._flash_attn_bwd(q, k, v, output.out, dout, output.lse, **keywords)
        return dq, dk, dv


LOADERS: dict[str, Callable[[], FlashKernel]] = {
    "cpu": CpuFlash,
    "torch": TorchCudaFlash,
    "flash_attn_2": FlashAttn2,
    "flash_attn_3": FlashAttn3,
    "flash_attn_4": FlashAttn4,
}
MODULES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}


def kernel_preference(device_type: str, dtype: torch.dtype, head_dim: int, compute_capability: int) -> tuple[str, ...]:
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
        return LOADERS[name]()
    except ModuleNotFoundError as error:
        if error.name is not None and module is not None and module.startswith(error.name):
            return None  # the package is not there at all
        logger.warning("%s is installed but does not load, so it is not used: %s", module, error)
    except Exception as error:  # of a package built for another torch or CUDA; whatever it is, PyTorch's own kernel is there
        logger.warning("%s is installed but does not load, so it is not used: %s", module, error)
    return None


def _serves(name: str, *, deterministic: bool) -> bool:
    kernel = load_kernel(name)
    return kernel is not None and (kernel.deterministic or not deterministic)


#: What `pick_kernel` has answered: a dict, which `torch.compile` reads where it would trace through `lru_cache`.
PICKED: dict[tuple[torch.device, torch.dtype, int, bool], FlashKernel | None] = {}


def pick_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> FlashKernel | None:
    """The best flash kernel present for such tensors, logged once; None where only `sdpa` is left."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = device, dtype, head_dim, deterministic
    if key not in PICKED:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        names = kernel_preference(device.type, dtype, head_dim, capability[0] * 10 + capability[1])
        kernel = next((load_kernel(name) for name in names if _serves(name, deterministic=deterministic)), None)
        PICKED[key] = kernel
        logger.info("attention on %s in %s: %s", device, dtype, kernel.name if kernel else "PyTorch's sdpa")
    return PICKED[key]
