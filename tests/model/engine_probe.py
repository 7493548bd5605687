"""Run by test_precision.py in a process of its own: trains a small model in a DeepSpeed bf16 engine on one rank and
prints what it saw as one line of JSON."""

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
from torch import Tensor

from launch.ranks.builds import compile_nothing
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.balance import LoadBalancer
from model.flash import load_kernel
from model.mask import causal_mask
from model.rope import apply_rope, yarn_concentration
from tests import reference

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_clipping": 1.0,
}
AUTO_EP = {"enabled": True, "autoep_size": 1, "preset_model": "deepseek_v3", "use_grouped_mm": False}


def engine(**overrides: Any) -> Any:
    torch.manual_seed(0)
    config = MoEGPTConfig.preset("tiny", vocab_size=512, max_position_embeddings=8192, rope_parameters=None, initializer_range=0.05)
    model = MoEGPTForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(0.1, 0.107, 8))
    settings = {**CONFIG, **overrides}
    return deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def probe_dtypes(ds: Any, seen: dict[str, Any]) -> None:
    captured: dict[str, Any] = {}
    layer = ds.module.model.layers[1]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, a, out: captured.update(router_in=a[0], router_out=out)),
        layer.register_forward_hook(lambda m, a, out: captured.update(stream=out)),
        layer.input_layernorm.register_forward_hook(lambda m, a, out: captured.update(norm_in=a[0], norm_out=out[1])),
        ds.module.model.norm.register_forward_hook(lambda m, a, out: captured.update(last=out)),
    ]
    ids = torch.randint(0, 512, (2, 65))
    loss = ds(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    for hook in hooks:
        hook.remove()
    gate = layer.mlp.gate
    seen["parameters"] = sorted({str(p.dtype) for p in ds.module.parameters()})
    seen["bias"] = str(gate.e_score_correction_bias.dtype)
    seen["bias_values_kept"] = torch.equal(gate.e_score_correction_bias, torch.linspace(0.1, 0.107, 8))
    seen["load"] = str(gate.load_E.dtype)
    seen["stream"] = str(captured["stream"].dtype)
    seen["loss"] = str(loss.dtype)
    seen["router_weights"] = str(captured["router_out"][0].dtype)
    probe_router(gate, captured, seen)
    x, weight = captured["norm_in"].double(), layer.input_layernorm.weight.double()
    exact = reference.rms_norm(x, weight, 1e-5)
    seen["norm_worst"] = float(((captured["norm_out"].double() - exact).abs() / exact.abs().clamp(min=1e-6)).max())
    exact_loss = reference.cross_entropy(
        captured["last"].detach().double().flatten(0, 1),
        ds.module.lm_head.weight.detach().double(),
        ids[:, 1:].flatten(),
        128.0,
    )
    seen["loss_error"] = abs(float(loss) - float(exact_loss))
    ds.backward(loss)
    ds.step()


def probe_router(gate: Any, captured: dict[str, Any], seen: dict[str, Any]) -> None:
    """The weights the engine's router gave, against the rule in Python floats from the same bf16 inputs."""
    x_TH, (weights, indices, *_) = captured["router_in"].detach().double(), captured["router_out"]
    logits = (x_TH @ gate.weight.detach().double().T).tolist()
    bias = gate.e_score_correction_bias.tolist()
    wrong, errors = 0, []
    for row, scores in enumerate(logits):
        rule = reference.route_token(scores, bias, 2, 4, 2, "sigmoid", True, 1.0)
        if set(rule) != set(indices[row].tolist()):
            wrong += 1
            continue
        for expert, weight in zip(indices[row].tolist(), weights[row].tolist(), strict=True):
            errors.append(abs(weight - rule[expert]))
    seen["router_wrong"], seen["router_worst"], seen["router_rows"] = wrong, float(torch.tensor(errors).max()), len(logits)


def probe_positions(ds: Any, seen: dict[str, Any]) -> None:
    """RoPE is relative: 64 tokens at the end of 8,192 give the logits of 64 tokens at the start."""
    model = ds.module.eval()
    rope = model.config.rope_parameters
    cos, sin = model.model.rotary(torch.tensor([[8191]]), 0, 1, torch.device("cpu"))
    frequencies = reference.yarn_frequencies(64, 10_000.0, 1.0, 8192)
    exact = [math.cos(8191 * f) * yarn_concentration(rope) for f in frequencies]
    seen["rope"] = str(cos.dtype)
    seen["rope_worst"] = float((cos[0, 0, :32].double() - torch.tensor(exact, dtype=torch.float64)).abs().max())
    ids, near = torch.randint(0, 512, (1, 64)), torch.arange(64)[None]
    for layer in model.model.layers:  # the same experts for all, or a token near a tie moves and hides the rest
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0]))
    with torch.no_grad():
        start = model(ids, position_ids=near).logits
        end = model(ids, position_ids=near + 8128).logits
        seen["shifted_8128"] = relative(end, start)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    x = torch.randn(1, 1, 4, 64, dtype=torch.bfloat16)
    seen["rotated"] = str(apply_rope(x, cos, sin).dtype)
    model.train()


def probe_attention(seen: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, 300, heads, 64, dtype=torch.bfloat16) * 3 for heads in (4, 2, 2))
    kernel = load_kernel("cpu")
    assert kernel is not None
    out, lse, _ = kernel.forward(q, k, v, causal_mask((1, 300), 0, q.device), 0.125)
    seen["lse"] = str(lse.dtype)
    allowed = torch.ones(1, 300, 300, dtype=torch.bool).tril()
    seen["attention_error"] = relative(out, reference.attention_with_sinks(*(x.double() for x in (q, k, v)), None, allowed))


def probe_balance(ds: Any, seen: dict[str, Any]) -> None:
    balancer = LoadBalancer(ds.module, rate=0.001)
    balancer.reset()
    ids = torch.randint(0, 512, (2, 65))
    before = [router.e_score_correction_bias.clone() for router in balancer.routers]
    for _ in range(3):
        loss = ds(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
        ds.backward(loss)
        ds.step()
    loads = [router.load_E.tolist() for router in balancer.routers]
    balancer.step()
    steps = []
    for router, old, load in zip(balancer.routers, before, loads, strict=True):
        expected = torch.tensor(reference.bias_step(old.tolist(), load, 0.001), dtype=torch.float64)
        steps.append((router.e_score_correction_bias.double() - expected).abs().max())
    seen["balance_worst"], seen["balance_routers"] = float(torch.stack(steps).max()), len(steps)
    seen["balance_tokens"] = [sum(load) for load in loads]


def probe_checkpointing(seen: dict[str, Any]) -> None:
    """DeepSpeed's own checkpointing function gives bit-equal losses over three steps."""
    from deepspeed.runtime.activation_checkpointing import checkpointing

    ids = torch.randint(0, 512, (2, 65))
    runs = []
    for function in (None, checkpointing.checkpoint):
        ds = engine()
        if function is not None:
            checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=False)
            ds.module._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
        losses = []
        for _ in range(3):
            loss = ds(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
            ds.backward(loss)
            ds.step()
            losses.append(float(loss))
        loads = [layer.mlp.gate.load_E.tolist() for layer in ds.module.model.layers]
        runs.append((losses, loads))
    seen["checkpointing_equal"] = runs[0] == runs[1]
    seen["checkpointing_losses"] = runs[0][0]


def probe_auto_ep(seen: dict[str, Any]) -> None:
    ds = engine(expert_parallel=AUTO_EP)
    moe = ds.module.model.layers[0].mlp
    seen["auto_ep"] = type(moe).__name__
    seen["auto_ep_bias"] = str(moe.router.e_score_correction_bias.dtype)
    seen["auto_ep_bias_kept"] = torch.equal(moe.router.e_score_correction_bias, torch.linspace(0.1, 0.107, 8))


def main() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        compile_nothing()
        deepspeed.init_distributed("gloo")
        seen: dict[str, Any] = {}
        ds = engine()
        probe_dtypes(ds, seen)
        probe_positions(ds, seen)
        probe_attention(seen)
        probe_balance(ds, seen)
        probe_checkpointing(seen)
        probe_auto_ep(seen)
    print("\n" + json.dumps(seen))


if __name__ == "__main__":
    main()
