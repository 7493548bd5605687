"""New tokens after cached prompts: ours, with and without sinks, beside transformers' Glm4Moe with the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Glm4MoeForCausalLM

from data.flags import at_least_one
from launch.benchmarks.measure import add_measuring_flags, print_table, seconds_each, settings_of
from launch.generation.decode import fast
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.glm4_moe import to_glm4_moe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, repeats=5)
    parser.add_argument("--model", default="tiny", help="a preset")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers (default: all)")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[32, 512], help="lengths of the prompt")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8], help="numbers of prompts at a time")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`{"rows": [{"prompt_tokens", "batch_size", names: tokens a second, "ratio"}]}`; prints the table as well."""
    at_least_one(args, "layers", "prompt_tokens", "batch_size", "new_tokens", "repeats")
    device = torch.device(args.device)
    models = build(args.model, args.layers, device, getattr(torch, args.dtype))
    rows = []
    for prompt in args.prompt_tokens:
        for batch in args.batch_size:
            ids = torch.arange(batch * prompt, device=device).view(batch, prompt) % models["ours"].config.vocab_size
            calls = {name: continuing(model, ids, args.new_tokens) for name, model in models.items()}
            best = seconds_each(calls, device, args.repeats)
            speeds = {name: batch * args.new_tokens / seconds for name, seconds in best.items()}
            peers = max(speed for name, speed in speeds.items() if name.startswith("transformers"))
            rows.append({"prompt_tokens": prompt, "batch_size": batch, **speeds, "ratio": speeds["ours"] / peers})
    columns = list(rows[0])
    title = f"{args.new_tokens} new tokens with {args.model}, {args.device}, {args.dtype}: tokens a second, prompt included; "
    print_table(title + "ratio: ours to the better of transformers'", columns, [[row[c] for c in columns] for row in rows])
    return {"rows": rows, "settings": settings_of(args)}


def continuing(model: Any, ids: torch.Tensor, count: int) -> Callable[[], object]:
    """Greedy, and never ended by the model: everybody makes as many tokens. Ours goes the way of `launch/generate.py`."""
    call = partial(model.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count)
    if isinstance(model, MoEGPTForCausalLM):
        return lambda: call(do_sample=False, pad_token_id=0, **fast(model))
    return lambda: call(do_sample=False, pad_token_id=0)


def build(preset: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The models by name; all without sinks hold the same weights."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    plain = MoEGPTConfig.preset(preset, attention_sinks=False, attn_implementation="sdpa", **fields)
    ours = MoEGPTForCausalLM(plain)
    sinks = MoEGPTForCausalLM(MoEGPTConfig.preset(preset, attn_implementation="sdpa", **fields))
    models: dict[str, Any] = {"ours": ours, "ours with sinks": sinks}
    for experts in ("grouped_mm", "eager"):
        theirs = Glm4MoeForCausalLM(to_glm4_moe(plain))
        theirs.load_state_dict(ours.state_dict())
        theirs.set_attn_implementation("sdpa")
        theirs.set_experts_implementation(experts)
        models[f"transformers ({experts})"] = theirs
    return {name: model.to(device, dtype).eval() for name, model in models.items()}
