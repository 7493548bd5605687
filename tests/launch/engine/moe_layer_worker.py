"""Our layer and stock AutoEP's forward on the same weights and tokens, fp32: what differs. Writes JSON, one row a case.

    moe_layer_worker.py OUTPUT

The stock side is AutoEP's own forward with its own expert loop; the router is ours on both sides, so that both route alike.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.utils import groups

from data.cli import UserError
from launch.cli import make_quiet
from launch.engine.build import build_engine
from launch.engine.moe_layer import MoELayer
from launch.ranks import join
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.rebuild import rebuilding
from model.replay import RouterReplay

TOKENS, HIDDEN = 96, 32


def make_layer(
    experts: int, top_k: int, ep: int, dropout: float = 0.0, **expert_parallel: object
) -> tuple[MoELayer, torch.nn.Module]:
    """`(the swapped layer, the plain one with the same weights)`, in fp32; `expert_parallel`: more of that section."""
    for held in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):  # DeepSpeed keeps them for a process's life
        getattr(groups, held).clear()
        getattr(groups, f"{held}_RANKS").clear()
    config = MoEGPTConfig.preset(
        "tiny", vocab_size=64, hidden_size=HIDDEN, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=1, topk_group=1,
        expert_dropout=dropout, routed_scaling_factor=2.5,
        norm_topk_prob=top_k > 1,  # of one weight, normalised, the router would learn nothing
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(3)
    model = MoEGPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    plain = model.model.layers[0].mlp
    section = {"enabled": True, "autoep_size": ep, "preset_model": "deepseek_v3", "use_grouped_mm": False, **expert_parallel}
    settings = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
        "expert_parallel": section,
    }
    return build_engine(model, settings).module.model.layers[0].mlp, plain


def leaves_of(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def run(call: Any, x: torch.Tensor, residual: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, and gradients of input, residual and weights."""
    out = call(x, residual)
    dout = torch.linspace(-1, 1, out.numel()).view_as(out).sin()
    return [out.detach(), *torch.autograd.grad(out, [x, residual, *leaves], dout)]


def stock(layer: MoELayer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    layer.experts.forward = partial(GroupedExperts.forward, layer.experts)
    # What AutoEP's kernels were written for: indices that `view` can flatten, counts in int32.
    hook = layer.router.register_forward_hook(lambda m, i, out: (out[0], out[1].contiguous(), out[2].int()))
    try:
        return residual + AutoEPMoELayer.forward(layer, x)
    finally:
        del layer.experts.forward
        hook.remove()


def compare(experts: int, top_k: int, ep: int, routing: str) -> dict[str, Any]:
    layer, _ = make_layer(experts, top_k, ep)
    bias = {"spread": torch.linspace(0.1, -0.1, experts), "one expert": torch.zeros(experts), "empty": torch.zeros(experts)}[
        routing
    ]
    if routing == "one expert":
        bias[-1] = 9
    if routing == "empty":
        bias[: experts // 2] = -9  # with EP 2 nobody sends the first rank a row
    layer.router.e_score_correction_bias.copy_(bias)
    torch.manual_seed(10 + dist.get_rank())
    x, residual = (torch.randn(2, TOKENS // 2, HIDDEN, requires_grad=True) for _ in range(2))
    leaves = leaves_of(layer)
    ours = run(layer, x, residual, list(leaves.values()))
    with rebuilding():  # saving less
        less = run(layer, x, residual, list(leaves.values()))
    load = [count // 2 for count in layer.router.load_E.tolist()]
    theirs = run(partial(stock, layer), x, residual, list(leaves.values()))
    names = ["out", "dx", "dresidual", *leaves]
    difference = {
        name: float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.any() else float(a.abs().max())
        for name, a, b in zip(names, ours, theirs, strict=True)
    }
    row = {"experts": experts, "top_k": top_k, "ep": ep, "routing": routing, "load": load, "difference": difference}
    row["rebuilt_equal"] = all(torch.equal(a, b) for a, b in zip(ours, less, strict=True))
    row["norms"] = {name: float(b.norm()) for name, b in zip(names, theirs, strict=True)}
    return row


def dropout_and_replay() -> dict[str, Any]:
    """The same seed drops the same as in the model's own layer; a replay repeats routing after the bias has changed."""
    layer, plain = make_layer(8, 2, 1, dropout=0.4)
    x = torch.randn(2, TOKENS // 2, HIDDEN)
    results = []
    for one in (layer, plain):
        torch.manual_seed(7)
        results.append(one(x, x).detach())
    replay = RouterReplay()
    with replay:
        torch.manual_seed(7)
        first = layer(x, x)
    counted = layer.router.load_E.clone()
    layer.router.e_score_correction_bias.copy_(torch.linspace(-3, 3, 8))
    with replay:
        torch.manual_seed(7)
        again = layer(x, x)
    counted_again = layer.router.load_E.clone()
    torch.manual_seed(7)
    fresh = layer(x, x)
    layer.eval()
    return {
        "dropout_equals_plain": torch.allclose(*results, rtol=1e-6, atol=1e-7),
        "dropped": not torch.equal(results[0], layer(x, x)),
        "replayed": torch.equal(first, again) and torch.equal(counted, counted_again),
        "would_differ": not torch.equal(first, fresh),
    }


def refusal(**expert_parallel: object) -> str:
    try:
        make_layer(8, 2, 1, **expert_parallel)
    except (UserError, RuntimeError) as error:
        return str(error)
    return "none"


def main() -> None:
    make_quiet()
    join.set_environment()
    join.start(timeout=120)
    results: dict[str, Any] = {}
    try:
        sizes = [1, 2] if dist.get_world_size() > 1 else [1]
        cases = product([(8, 2), (2, 1)], sizes, ("spread", "one expert", "empty"))
        results["cases"] = [compare(*count, ep, routing) for count, ep, routing in cases]
        results.update(dropout_and_replay(), refusal=refusal(score_apply="pre"), without_shared=refusal(has_shared_experts=False))
    except Exception:
        results["error"] = traceback.format_exc()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
