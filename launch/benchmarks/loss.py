"""Cross entropy with the output projection, forward and backward: ours beside plain logits, PyTorch's and Liger's."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.flags import at_least_one
from launch.benchmarks.measure import add_measuring_flags, peak_bytes, print_table, seconds_each, settings_of
from launch.toolchain import default_device
from model.loss import token_loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, repeats=2)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in a batch")
    parser.add_argument("--hidden", type=int, default=512 if default_device() == "cpu" else 1536, help="width of the hidden states")
    parser.add_argument("--vocabulary", type=int, default=49_152, help="vocabulary size")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`{"rows": {name: {"ms", "peak_mb", "time_over_plain", "memory_over_plain", "gradient_difference"}}}`; prints it too."""
    at_least_one(args, "tokens", "hidden", "vocabulary", "repeats")
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    x = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype).requires_grad_()
    head = (torch.randn(args.vocabulary, args.hidden, device=device) * args.hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), device=device)
    calls: dict[str, Callable[[], object]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, call in contenders(device).items():

        def once(call: Callable[..., Tensor] = call) -> None:
            x.grad = head.grad = None
            call(x, head, targets).backward()

        calls[name] = once
        once()
        gradients[name] = [g.clone() for g in (x.grad, head.grad) if g is not None]
    times = seconds_each(calls, device, args.repeats)
    rows: dict[str, dict[str, float]] = {}
    for name, step in calls.items():
        x.grad = head.grad = None
        rows[name] = {"ms": 1e3 * times[name], "peak_mb": peak_bytes(step, device) / 2**20}
    for name, row in rows.items():
        row["time_over_plain"] = row["ms"] / rows["plain"]["ms"]
        row["memory_over_plain"] = row["peak_mb"] / rows["plain"]["peak_mb"]
        pairs = zip(gradients[name], gradients["plain"], strict=True)
        row["gradient_difference"] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    title = f"loss forward + backward, {args.device}, {args.dtype}, {args.tokens} x {args.hidden} -> {args.vocabulary}"
    columns = ["ms", "peak_mb", "time_over_plain", "memory_over_plain", "gradient_difference"]
    print_table(title, ["", *columns], [[name, *(row[c] for c in columns)] for name, row in rows.items()])
    return {"rows": rows, "settings": settings_of(args)}


def contenders(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """By name, each (x, head, targets) -> mean loss; those that are installed."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "plain": lambda x, head, targets: F.cross_entropy(F.linear(x, head).float(), targets),
        "ours": token_loss,
        "ours with z-loss": lambda x, head, targets: token_loss(x, head, targets, None, 1e-4),
    }
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        found["torch chunked"] = lambda x, head, targets: F.linear_cross_entropy(x, head, targets, options=options())
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        liger = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        function = liger.LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, head, targets: function(head, x, targets)
    return found
