"""Run by `test_kernels.py`, under Triton's interpreter or on a GPU: each kernel beside the plain formula in float64, forward and
gradient; under the interpreter also a whole model.

The same call takes the kernels in fp32 and bf16, and the plain way in float64. Prints one JSON object: the relative error by case.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from model import MoEGPTConfig, MoEGPTForCausalLM, operators
from model.attention import Attention
from model.dispatch import combine, expert_order, gather_beside, gather_rows, swiglu, tally
from model.layers import ResidualNorm, RMSNorm
from model.loss import token_loss
from model.mask import causal_mask
from model.moe import Gate
from model.replay import RouterReplay
from model.sinks import add_sink, sink_gradient

Results = dict[str, float]


def with_kernels(x: Tensor) -> bool:
    return x.dtype != torch.float64


def error(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def both_ways(call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest relative error of outputs and of gradients by every floating input."""
    results = []
    floats = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    for kind in (dtype, torch.float64):
        given = [x.detach().to(kind).requires_grad_() if x.is_floating_point() else x for x in floats]
        outputs = call(*given)
        kept = [x for x in outputs if x.requires_grad]
        torch.manual_seed(1)
        weights = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in kept]
        wanted = [x for x in given if x.requires_grad]
        torch.autograd.backward(kept, [w.to(x.dtype) for w, x in zip(weights, kept, strict=True)])
        results.append([*(x.detach() for x in outputs), *(x.grad for x in wanted if x.grad is not None)])
    ours, plain = results
    assert len(ours) == len(plain) > 0, (len(ours), len(plain), [x.shape for x in inputs])
    return max(map(error, ours, plain))


def norm(cls: type[RMSNorm], x: Tensor, weight: Tensor, *added: Tensor) -> Sequence[Tensor]:
    layer = cls(x.shape[-1], 1e-5)
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]
    out = layer(x, *added)
    return out if isinstance(out, tuple) else [out]


def turned(config: MoEGPTConfig, q: Tensor, k: Tensor, *others: Tensor) -> Sequence[Tensor]:
    layer = Attention(config, 0)
    q_weight, k_weight, cos, sin = others
    if config.qk_norm:
        for module, weight in ((layer.q_norm, q_weight), (layer.k_norm, k_weight)):
            del module.weight
            module.weight = weight  # type: ignore[assignment]
    tables = (x.detach().to(torch.promote_types(q.dtype, torch.float32)) for x in (cos, sin))
    return layer._turned(q, k, (*tables,))  # type: ignore[arg-type]


def mixture(x: Tensor, weights: Tensor, shared: Tensor, residual: Tensor, indices: Tensor) -> Sequence[Tensor]:
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    order, inverse = expert_order(indices)
    rows, first, second = gather_beside(x, order, inverse, indices.shape[1])
    hidden = swiglu(rows * 1, rows.flip(-1), tally_R=tally(weights, inverse))
    whole = combine(hidden, order, inverse, weights, shared, residual)
    alone = gather_rows(x, order, inverse, indices.shape[1])
    packed = swiglu(torch.cat((alone, alone * 2), dim=-1), tally_R=tally(weights, inverse))
    return rows, first * 2, second * 3, whole, combine(packed, order, inverse, weights)


def routed(config: MoEGPTConfig, replay: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    gate = Gate(config)
    del gate.weight
    gate.weight = weight  # type: ignore[assignment]
    gate.e_score_correction_bias = bias.detach().to(torch.promote_types(x.dtype, torch.float32))
    tape = RouterReplay()
    tape.choices, tape._recorded = [torch.arange(x.shape[0] * 2).view(-1, 2) % config.n_routed_experts], replay
    with tape:
        weights, indices, counts, beside = gate(x)
    return weights, indices, counts, beside, gate.load_E, gate.logit_square_sum


def sinks(out: Tensor, lse: Tensor, sink: Tensor, dout: Tensor) -> Sequence[Tensor]:
    accumulate = torch.promote_types(out.dtype, torch.float32)
    with torch.no_grad():
        out_with, lse_with = add_sink(out, lse.to(accumulate), sink)
        gradient = sink_gradient(dout, out_with, lse_with, sink)
    return out_with, lse_with, gradient


def model_step(config: MoEGPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = MoEGPTForCausalLM(config).double()
    nn.init.normal_(model.model.layers[0].mlp.gate.weight)
    model = model.to(dtype).train()
    ids = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def cases(dtype: torch.dtype) -> Results:
    tokens, hidden, experts = 20, 96, 8
    random = partial(torch.randn, dtype=torch.float64)
    x, weight = random(2, tokens, hidden), random(hidden)
    found: Results = {}

    def case(name: str, call: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
        found[name] = both_ways(call, inputs, dtype)

    case("norm", partial(norm, RMSNorm), x, weight)
    case("norm beside the stream", partial(norm, ResidualNorm), x, weight)
    case("norm of a sum", partial(norm, ResidualNorm), x, weight, random(2, tokens, hidden))
    for qk_norm in (True, False):
        config = MoEGPTConfig.preset("tiny", qk_norm=qk_norm)
        n, m, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        for rows in (1, 2):
            tables = random(rows, tokens, d), random(rows, tokens, d)
            name = f"q and k: norm {qk_norm}, {rows} rows of positions"
            case(name, partial(turned, config), random(2, tokens, n, d), random(2, tokens, m, d), random(d), random(d), *tables)
    case("sinks", sinks, random(2, 70, 3, 16), random(2, 3, 70), random(3), random(2, 70, 3, 16))
    case("sinks, packed", sinks, random(70, 3, 16), random(3, 70), random(3), random(70, 3, 16))
    indices = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    case("gather and combine", mixture, x[0], torch.rand(tokens, 2), random(tokens, hidden), random(tokens, hidden), indices)
    case("swiglu, packed", lambda x: [swiglu(x)], random(tokens, hidden))
    case("swiglu, apart", lambda a, b: [swiglu(a, b)], random(tokens, hidden), random(tokens, hidden))
    rules = (
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid"},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "scoring_func": "sigmoid"},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "scoring_func": "softmax"},
    )
    for rule in rules if dtype == torch.float32 else rules[1:2]:
        config = MoEGPTConfig.preset("tiny", n_routed_experts=experts, hidden_size=hidden, routed_scaling_factor=1.5, **rule)
        # well apart, so that rounding chooses nobody else; the bias is negative, where a masked 0 would win
        for replay in (False, True):
            call = partial(routed, config, replay)
            gate, bias = 0.2 * random(experts, hidden), -1 - 0.1 * torch.rand(experts)
            case(f"router {rule}, replay {replay}", call, random(tokens, hidden), gate, bias)
    for z_weight in (0.0, 0.1):
        targets = torch.randint(0, 50, (tokens,))
        targets[3] = -100
        loss = lambda x, head, targets, z=z_weight: [token_loss(x, head, targets, None, z)]  # noqa: E731
        case(f"loss, z {z_weight}", loss, x[0], random(50, hidden), targets)
    return found


def ties() -> float:
    """Equal scores go to the lower index."""
    config = MoEGPTConfig.preset("tiny", n_routed_experts=8, n_group=4, topk_group=2)
    inputs = torch.randn(5, config.hidden_size), torch.zeros(8, config.hidden_size), torch.zeros(8)
    chosen = [routed(config, False, *(x.to(dtype) for x in inputs))[1] for dtype in (torch.float32, torch.float64)]
    return error(*chosen)


def compiled(config: MoEGPTConfig) -> float:
    """A block that dynamo traces and autograd's graph splits, with the operators in it."""
    torch.manual_seed(0)
    block = MoEGPTForCausalLM(config).model.layers[0].bfloat16().train()
    x = torch.randn(1, 24, config.hidden_size, dtype=torch.bfloat16)
    angles = torch.rand(1, 24, config.head_dim)
    results = []
    for call in (block, torch.compile(block, backend="aot_eager")):
        block.zero_grad()
        given = x.clone().requires_grad_()
        mask = causal_mask((1, 24), 0, x.device, None, None)
        out = call(given, rope=(angles.cos(), angles.sin()), mask=mask, replay=RouterReplay())
        out.square().sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in block.parameters())])
    return max(map(error, *results))


def main() -> None:
    on_gpu = "--gpu" in sys.argv
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    operators.fits = with_kernels
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found |= {f"{dtype}: {name}".removeprefix("torch."): value for name, value in cases(dtype).items()}
    found["ties"] = ties()
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=2, hidden_size=64, vocab_size=128, z_loss_weight=1e-3)
    if not on_gpu:  # no grouped product and no flash attention there in fp32 and float64
        ours, plain = (model_step(config, dtype) for dtype in (torch.float32, torch.float64))
        assert ours.keys() == plain.keys() and len(ours) > 20
        found["float32: a model's loss and gradients"] = max(error(ours[name], plain[name]) for name in plain)
    if "--compile" in sys.argv:
        found["compiled block"] = compiled(config)
    used = {name for name in ("norm", "rows", "router", "sinks", "loss") if f"model.kernels.{name}" in sys.modules}
    assert len(used) == 5, used
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
