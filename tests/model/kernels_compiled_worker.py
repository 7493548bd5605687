"""Run by `test_kernels_compiled.py`: what `ptxas` makes of each kernel, at `800m`'s sizes, for GPUs that are not there.

The wrappers of `model/kernels/` are called with tensors of the device `meta`, and each launch is compiled in place of being
run: with the constants, the alignment and the warps that a GPU would be given. Prints one JSON object, see `main`.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from model import MoEGPTConfig, kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MODULES = {name: import_module(f"model.kernels.{name}") for _, name, _ in pkgutil.iter_modules(kernels.__path__)}
RULE = True, True, 1.0  # sigmoid, normalised, no factor
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]
Calls = dict[tuple[str, ...], Callable[[], Any]]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> Calls:
    """By the names, in `model/README.md`, of the kernels that it launches in turn: a call."""
    norm, rows, loss, sinks = (MODULES[name] for name in ("norm", "rows", "loss", "sinks"))
    config = MoEGPTConfig.preset("800m")
    batch, length, hidden, width = 8, 2048, config.hidden_size, config.moe_intermediate_size
    tokens, k, fp32 = batch * length, config.num_experts_per_tok, torch.float32
    n, m, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x, weight, places = meta(tokens, hidden), meta(hidden), meta(tokens * k, dtype=torch.int64)
    q, key, heads, tables = meta(tokens, n, d), meta(tokens, m, d), [meta(d), meta(d)], [meta(length, d, dtype=fp32)] * 2
    out, lse, sink = meta(batch, length, n, d), meta(batch, n, length, dtype=fp32), meta(n)
    routed, weights, inner = meta(tokens * k, hidden), meta(tokens, k, dtype=fp32), meta(tokens * k, width)
    chunk, targets, scale = meta(2048, config.vocab_size), meta(2048, dtype=torch.int64), meta(dtype=fp32)
    return {
        ("norm",): lambda: norm.norm_forward(x, x, weight, 1e-5),
        ("norm, backward", "sum over programs"): lambda: norm.norm_backward(x, x, x, weight, 1e-5),
        ("q, k",): lambda: norm.norm_rope(q, key, heads, *tables, 1e-5),
        ("q, k, backward", "sum over programs, q, k"): lambda: norm.norm_rope_backward(q, key, q, key, heads, *tables, 1e-5),
        ("sink",): lambda: sinks.add_sink(out, lse, sink),
        ("sink, gradient", "sum over programs, sink"): lambda: sinks.sink_gradient(out, out, lse, sink),
        ("gather",): lambda: rows.spread(x, places, k, None),
        ("gather, with weights",): lambda: rows.spread(x, places, k, weights),
        ("gather, its sum",): lambda: rows.collect(routed, places, k, x, x),
        ("combine",): lambda: rows.combine(routed, places, weights, x, x),
        ("combine, weights' gradient",): lambda: rows.weight_gradient(meta(tokens * k, dtype=fp32), places, weights),
        ("swiglu",): lambda: rows.swiglu([inner, inner]),
        ("swiglu, backward",): lambda: rows.swiglu_backward(inner, [inner, inner], False),
        ("swiglu, with products",): lambda: rows.swiglu_backward(inner, [inner, inner], True),
        **routing(config.n_routed_experts, k, config.n_group, config.topk_group),
        ("cross entropy",): lambda: loss.cross_entropy_(chunk, targets, scale, 1e-4, True, -100),
        **products(config.n_routed_experts, tokens * k, hidden, width),
    }


def products(experts: int, rows: int, hidden: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Calls:
    """Of gate and up, by expert."""
    grouped, ends, x = MODULES["grouped"], meta(experts, dtype=torch.int32), meta(rows, hidden, dtype=dtype)
    weights, dout = [meta(experts, width, hidden, dtype=dtype)] * 2, meta(rows, 2 * width, dtype=dtype)
    return {
        ("product",): lambda: grouped.product(x, ends, weights),
        ("product, backward",): lambda: grouped.product_backward(dout, ends, weights),
        ("product, weight",): lambda: grouped.weight_gradient(dout, x, ends, 2),
    }


def by_tiles() -> Calls:
    """The products by each of the tiles, named by its place among them; in exact fp32; at widths that no tile divides."""
    grouped, found = MODULES["grouped"], {}

    def by(tile: Any, call: Callable[[], Any]) -> None:
        with mock.patch.object(grouped, "choose", lambda *_, **__: tile):
            call()

    cases = {f"tile {number}": (tile, products(8, 32768, 1536, 512)) for number, tile in enumerate(grouped.TILES)}
    cases |= {f"tile {number}, in parts": (tile, products(8, 32768, 1552, 528)) for number, tile in enumerate(grouped.TILES)}
    cases["exact"] = grouped.EXACT, products(8, 32768, 1536, 512, torch.float32)
    for name, (tile, calls) in cases.items():
        found.update({(f"{kind}, {name}",): partial(by, tile, call) for (kind,), call in calls.items()})
    return found


def routing(experts: int, k: int, groups: int, chosen_groups: int) -> Calls:
    router, x, gate = MODULES["router"], meta(16384, 1536), meta(experts, 1536)
    logits, bias = meta(16384, experts, dtype=torch.float32), meta(experts, dtype=torch.float32)
    weights, choice = meta(16384, k, dtype=torch.float32), meta(16384, k, dtype=torch.int64)
    return {
        ("router",): lambda: router.route(x, gate, bias, None, k, groups, chosen_groups, *RULE),
        ("lift",): lambda: router.add_lift_(meta(experts, 1000, dtype=torch.int64), logits, bias, k, groups, chosen_groups, True),
        ("router, backward", "router, weight", "sum over programs"): lambda: router.route_backward(
            weights, x, x, gate, logits, choice, *RULE
        ),
    }


def faults() -> Calls:
    """What must be seen: rows that no load of 16 bytes fits, and (see `main`) too few registers."""
    norm, odd = MODULES["norm"], meta(1024, 1535)
    return {("odd rows",): lambda: norm.norm_forward(odd, odd, meta(1535), 1e-5)}


def launches_of(calls: Calls) -> dict[str, Launch]:
    """The first launch under each name."""
    seen: list[Launch] = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: seen.append((kernel, args, kwargs))
    found: dict[str, Launch] = {}
    for names, call in calls.items():
        seen.clear()
        call()
        for name, launch in zip(names, seen, strict=True):
            found.setdefault(name, launch)
    return found


def compiled(launch: Launch, capability: int, **options: Any) -> dict[str, Any]:
    kernel, args, kwargs = launch
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bound, specialised, parsed = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(backend, {**kwargs, **options}, bound, specialised, parsed)
    done = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(done.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    said = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    steps = re.findall(r"((?:ld|st)\.global(?:\.v\d)?\.b\d+|cp\.async\.c[ag]\.shared\.global|bar\.sync)", done.asm["ptx"])
    return {"registers": said["REG"], "spilled": said["STACK"] + said["LOCAL"], "steps": steps}


def main() -> None:
    """`kernels`, and `faults`: by name and capability what `compiled` says; `launched` and `all`: the kernels' own names."""
    wanted = {"--many_experts": partial(routing, 128, 8, 8, 4), "--tiles": by_tiles}
    named = launches_of(wanted[sys.argv[1]]() if sys.argv[1:] else calls())
    found = {name: {capability: compiled(launch, capability) for capability in (80, 90)} for name, launch in named.items()}
    wrong = {name: compiled(launch, 80) for name, launch in launches_of(faults()).items()}
    if "norm, backward" in named:
        wrong["too few registers"] = compiled(named["norm, backward"], 80, maxnreg=32)
    every = {
        name
        for module in MODULES.values()
        for name, kernel in vars(module).items()
        if isinstance(kernel, JITFunction) and not name.startswith("_")  # which others call
    }
    launched = {kernel.__name__ for kernel, _, _ in named.values()}
    json.dump({"kernels": found, "faults": wrong, "launched": sorted(launched), "all": sorted(every)}, sys.stdout)


if __name__ == "__main__":
    main()
