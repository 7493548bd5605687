"""Attention with sinks, forward and backward: each kernel at hand beside eager and transformers' GPT-OSS and Glm4Moe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from data.cli import UserError
from data.flags import at_least_one
from launch.benchmarks.measure import add_measuring_flags, peak_bytes, print_table, seconds_each, settings_of
from model.attention import eager_attention, flash_attention, sdpa_attention
from model.flash import kernel_preference, load_kernel
from model.mask import causal_mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, repeats=3, dtypes=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, default=1, help="number of rows")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--heads", type=int, default=24, help="query heads")
    parser.add_argument("--key_value_heads", type=int, default=8, help="key and value heads")
    parser.add_argument("--head_dim", type=int, default=64, help="width of a head")
    parser.add_argument("--documents", type=int, default=8, help="documents packed into a row, for the last lines of the table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`{"rows": {name: {"ms", "peak_mb", "speedup_over_eager", "worst_error"}}}`; prints the table as well."""
    at_least_one(args, "batch", "length", "heads", "key_value_heads", "head_dim", "documents", "repeats")
    if args.heads % args.key_value_heads:
        raise UserError(f"--heads {args.heads} is no multiple of the {args.key_value_heads} heads of --key_value_heads")
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = (args.batch, args.length)
    inputs = make_inputs(args, device, dtype)
    sinks = inputs[3]
    plain, packed = causal_mask(shape, 0, device), causal_mask(shape, 0, device, packed_positions(args, device))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    names = kernel_preference(device.type, dtype, args.head_dim, 10 * capability[0] + capability[1])
    present = [name for name in names if load_kernel(name) is not None]
    calls: dict[str, Callable[..., Tensor]] = {
        "eager": lambda q, k, v, s: eager_attention(q, k, v, s, plain),
        "transformers GPT-OSS (eager)": lambda q, k, v, s: gpt_oss(q, k, v, s, args),
        "sdpa": lambda q, k, v, s: sdpa_attention(q, k, v, s, plain),
    }
    for name in present:
        calls[f"flash: {name}"] = lambda q, k, v, s, name=name: flash_attention(q, k, v, s, plain, kernel=name)
        calls[f"flash: {name}, no sinks"] = lambda q, k, v, _, name=name: flash_attention(q, k, v, None, plain, kernel=name)
    calls["transformers Glm4Moe (sdpa, no sinks)"] = lambda q, k, v, _: glm4_moe(q, k, v, args)
    calls["eager, documents"] = lambda q, k, v, s: eager_attention(q, k, v, s, packed)
    for name in present:
        calls[f"flash: {name}, documents"] = lambda q, k, v, s, name=name: flash_attention(q, k, v, s, packed, kernel=name)
    rows = measure(calls, inputs, device, args.repeats)
    compare(rows, calls, inputs, sinks)
    report(rows, args)
    return {"rows": rows, "settings": settings_of(args)}


def make_inputs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads = (args.heads, args.key_value_heads, args.key_value_heads)
    q, k, v = (torch.randn(args.batch, args.length, n, args.head_dim, device=device, dtype=dtype) for n in heads)
    sinks = torch.randn(args.heads, device=device, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, sinks)]


def packed_positions(args: argparse.Namespace, device: torch.device) -> Tensor:
    length: int = math.ceil(args.length / args.documents)
    return (torch.arange(args.length, device=device) % length)[None].expand(args.batch, -1)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, args: argparse.Namespace) -> Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = args.heads // args.key_value_heads, sinks
    mask = torch.full((args.length, args.length), -torch.inf, device=q.device, dtype=q.dtype).triu(1)[None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = eager_attention_forward(module, q, k, v, mask, scaling=args.head_dim**-0.5)[0]
    return out


def glm4_moe(q: Tensor, k: Tensor, v: Tensor, args: argparse.Namespace) -> Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = args.heads // args.key_value_heads, True  # type: ignore[assignment]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = sdpa_attention_forward(module, q, k, v, None, scaling=args.head_dim**-0.5, is_causal=True)[0]
    return out


def measure(
    calls: dict[str, Callable[..., Tensor]], inputs: list[Tensor], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    def both(call: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            out = call(*inputs)
            out.backward(out.detach())
            for x in inputs:
                x.grad = None

        return once

    whole = {name: both(call) for name, call in calls.items()}
    times = seconds_each(whole, device, repeats)
    return {name: {"ms": 1e3 * times[name], "peak_mb": peak_bytes(whole[name], device) / 2**20} for name in calls}


def compare(
    rows: dict[str, dict[str, float]], calls: dict[str, Callable[..., Tensor]], inputs: list[Tensor], sinks: Tensor
) -> None:
    """Adds each row's largest relative error (output and gradients) against eager in fp32, with its sinks and mask."""
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]

    def everything(call: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
        out = call(*given)
        gradients = torch.autograd.grad(out, given, torch.ones_like(out), allow_unused=True)
        return [out.detach(), *(g for g in gradients if g is not None)]

    exact = {"": everything(calls["eager"], exact_inputs), "documents": everything(calls["eager, documents"], exact_inputs)}
    for name, row in rows.items():
        if name.endswith("no sinks") or "Glm4Moe" in name:
            continue  # it computes something else
        expected = exact["documents" if name.endswith("documents") else ""]
        pairs = zip(everything(calls[name], inputs), expected, strict=True)
        row["worst_error"] = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)


def report(rows: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    for name, row in rows.items():
        row["speedup_over_eager"] = rows["eager, documents" if name.endswith("documents") else "eager"]["ms"] / row["ms"]
    title = (
        f"attention forward + backward, {args.device}, {args.dtype}, {args.batch} x {args.length} tokens, "
        f"{args.heads}/{args.key_value_heads} heads of {args.head_dim}"
    )
    body = [[name, row["ms"], row["peak_mb"], row["speedup_over_eager"], row.get("worst_error", "-")] for name, row in rows.items()]
    print_table(title, ["", "ms", "peak MB", "x eager", "error vs fp32"], body)
