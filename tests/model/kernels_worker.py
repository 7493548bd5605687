"""Run by `test_kernels.py`, under Triton's interpreter or on a GPU: each kernel beside the plain formula in float64, forward and
gradient; under the interpreter also a whole model.

The same call takes the kernels in fp32 and bf16, and the plain way in float64. Prints one JSON object: `errors`, the relative
error by case; `lifts`, `rounded`, `edges`, see there; under the interpreter also `loops`, of each loop in a kernel how often it
went round with a short last trip, and the largest error of a case when it stops after its first; `operators`, what each says
wrongly of itself; `graphs`, those in a compiled region.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from kernel_loops import Loops
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from model import MoEGPTConfig, MoEGPTForCausalLM, grouped, operators
from model.attention import Attention
from model.dispatch import combine, expert_order, gather_beside, gather_rows, grouped_linears, swiglu, tally
from model.layers import ResidualNorm, RMSNorm
from model.loss import token_loss
from model.mask import causal_mask
from model.replay import RouterReplay
from model.router import Gate
from model.sinks import add_sink, sink_gradient

Results = dict[str, float]
KERNELS = ("norm", "rows", "router", "sinks", "loss")
#: Without groups; with; of chosen groups all experts chosen, so that only groups are left out; with softmax, every group chosen.
LIFT_RULES = (
    {"n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    {"n_routed_experts": 32, "n_group": 4, "topk_group": 2},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 1},
    {"n_routed_experts": 8, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 3, "scoring_func": "softmax"},
)
random = partial(torch.randn, dtype=torch.float64)


def kernels(name: str) -> ModuleType:
    return import_module(f"model.kernels.{name}")


def with_kernels(x: Tensor) -> bool:
    return x.dtype != torch.float64


def error(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    found = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    return found if found == found else float("inf")  # which a maximum cannot miss


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


def by_expert(x: Tensor, gate: Tensor, up: Tensor, ends: Tensor) -> Sequence[Tensor]:
    return [torch.cat(grouped_linears(x, ends, gate, up), dim=1)]


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


def cases(dtype: torch.dtype, case: Callable[..., None]) -> None:
    tokens, hidden, experts = 20, 96, 8
    x, weight = random(2, tokens, hidden), random(hidden)
    case("norm", partial(norm, RMSNorm), x, weight)
    case("norm beside the stream", partial(norm, ResidualNorm), x, weight)
    case("norm of a sum", partial(norm, ResidualNorm), x, weight, random(2, tokens, hidden))
    for qk_norm in (True, False):
        config = MoEGPTConfig.preset("tiny", qk_norm=qk_norm)
        n, m, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        for rows in (1, 2):
            turns = random(rows, tokens, d), random(rows, tokens, d)
            name = f"q and k: norm {qk_norm}, {rows} rows of positions"
            case(name, partial(turned, config), random(2, tokens, n, d), random(2, tokens, m, d), random(d), random(d), *turns)
    odd = MoEGPTConfig.preset("tiny", head_dim=24)  # not a tile's
    n, m = odd.num_attention_heads, odd.num_key_value_heads
    q, k, weights = random(1, tokens, n, 24), random(1, tokens, m, 24), (random(24), random(24))
    case("q and k, head_dim 24", partial(turned, odd), q, k, *weights, *tables(tokens, 24))
    six = MoEGPTConfig.preset("tiny", hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=16)  # nor these
    q, k, weights = random(2, 8, 6, 16), random(2, 8, 3, 16), (random(16), random(16))
    case("q and k, 6 and 3 heads", partial(turned, six), q, k, *weights, *tables(8, 16))
    case("sinks, head_dim 24", sinks, random(70, 3, 24), random(3, 70), random(3), random(70, 3, 24))
    case("sinks", sinks, random(2, 70, 3, 16), random(2, 3, 70), random(3), random(2, 70, 3, 16))
    case("sinks, packed", sinks, random(70, 3, 16), random(3, 70), random(3), random(70, 3, 16))
    indices = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    case("gather and combine", mixture, x[0], torch.rand(tokens, 2), random(tokens, hidden), random(tokens, hidden), indices)
    unrouted = lambda x: [y.sin() for y in gather_beside(x, *expert_order(indices), 2)[1:]]  # noqa: E731
    case("gather, rows that nobody wants", unrouted, x[0])
    if dtype == torch.float32:  # whose tests are in grouped_worker.py
        ends = torch.tensor([7, 7, 40], dtype=torch.int32)
        case("products by expert", by_expert, random(40, 48), random(3, 32, 48), random(3, 32, 48), ends)
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


def loop_cases(case: Callable[..., None]) -> None:
    """Sizes at which every loop goes round several times, the last time not in full, once programs and blocks are as small as
    `small` makes them."""
    tokens, hidden = 20, 96
    x = random(tokens, hidden)
    case("norm", partial(norm, ResidualNorm), x[:10], random(hidden), random(10, hidden))
    config = MoEGPTConfig.preset("tiny")
    n, m, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    case("q and k", partial(turned, config), random(2, 5, n, d), random(2, 5, m, d), *(random(d) for _ in range(2)), *tables(5, d))
    weighed = lambda a, b, weights: [swiglu(a, b, tally_R=tally(weights, torch.arange(70)))]  # noqa: E731
    case("swiglu", weighed, random(70, hidden), random(70, hidden), 0.1 + torch.rand(70, 1))  # more weights than a block
    routing = MoEGPTConfig.preset("tiny", n_routed_experts=8, hidden_size=hidden, n_group=2, topk_group=1)
    case("router", partial(routed, routing, False), *apart(tokens, 8, hidden))
    targets = torch.randint(0, 50, (3,))
    case("loss", lambda x, head: [token_loss(x, head, targets, None, 0.1)], x[:3], random(50, hidden))
    case("sum of 150 rows", lambda rows: [summed(rows)], random(150, 40))


@contextmanager
def small() -> Iterator[None]:
    with ExitStack() as stack:
        for name, size, value in (("norm", "PROGRAMS", 3), ("router", "SHARES", 1), ("rows", "BLOCK", 64), ("loss", "BLOCK", 16)):
            stack.enter_context(mock.patch.object(kernels(name), size, value))
        yield


def real_cases(case: Callable[..., None]) -> None:
    """The sizes of `800m`, and the width of `4b`'s experts."""
    config = MoEGPTConfig.preset("800m")
    batch, length, hidden = 2, 2048, config.hidden_size
    tokens, experts, width = batch * length, config.n_routed_experts, MoEGPTConfig.preset("4b").moe_intermediate_size
    n, m, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x, added = random(batch, length, hidden), random(batch, length, hidden)
    case("norm of a sum", partial(norm, ResidualNorm), x, random(hidden), added)
    q, k = random(batch, length, n, d), random(batch, length, m, d)
    case("q and k", partial(turned, config), q, k, random(d), random(d), *tables(length, d))
    case("sinks", sinks, q, random(batch, n, length), random(n), random(batch, length, n, d))
    x, added, shared = x.flatten(0, 1), added.flatten(0, 1), random(tokens, hidden)
    indices = torch.rand(tokens, experts).argsort(dim=1)[:, :2]
    case("gather and combine", mixture, x, torch.rand(tokens, 2), shared, added, indices)
    case("swiglu", lambda a, b: [swiglu(a, b)], random(1024, width), random(1024, width))
    for replay in (False, True):
        case(f"router, replay {replay}", partial(routed, config, replay), *apart(tokens, experts, hidden))
    targets = torch.randint(0, config.vocab_size, (1024,))
    loss = lambda x, head: [token_loss(x, head, targets, None, 0.1)]  # noqa: E731
    case("loss", loss, x[:1024], hidden**-0.5 * random(config.vocab_size, hidden))


def tables(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    return random(1, positions, dim), random(1, positions, dim)


def apart(tokens: int, experts: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The router's input, weight and bias, with scores and sums of two scores so far apart that rounding chooses nobody else."""
    logits = torch.tensor([-2.1, -1.4, -0.9, 0.5, 1.2, 1.6, 2.0, 2.2], dtype=torch.float64)
    gate = 0.2 * random(experts, hidden)
    wanted = logits[torch.rand(tokens, experts).argsort(dim=1)]
    return wanted @ torch.linalg.pinv(gate).T, gate, -torch.ones(experts)


def summed(rows: Tensor) -> Tensor:
    rows = rows.detach()
    found: Tensor = kernels("norm").summed(rows, rows[0]) if operators.fits(rows) else rows.sum(dim=0)
    return found


def of(cases: Callable[[Callable[..., None]], None], dtype: torch.dtype) -> Results:
    """The relative error of each case."""
    found: Results = {}

    def case(name: str, call: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
        found[name] = both_ways(call, inputs, dtype)

    cases(case)
    return {f"{dtype}: {name}".removeprefix("torch."): value for name, value in found.items()}


def going_round() -> tuple[Results, dict[str, tuple[int, float]]]:
    """Errors of `loop_cases`; of each loop how often it goes round, and the error of a case where it stops after its first trip."""
    loops = Loops(map(kernels, KERNELS))
    entering: dict[str, tuple[Callable[..., Sequence[Tensor]], Sequence[Tensor]]] = {}
    errors: Results = {}

    def case(name: str, call: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
        loops.entered.clear()
        errors[f"float32: {name}, loops"] = both_ways(call, inputs, torch.float32)
        entering.update((loop, (call, inputs)) for loop in loops.entered - entering.keys())

    with small():
        loop_cases(case)
        found = {}
        for loop in loops.names.values():
            loops.cut = loop
            call, inputs = entering.get(loop, (None, ()))
            noticed = both_ways(call, inputs, torch.float32) if call else 0.0
            found[loop] = loops.trips.get(loop, 0), min(noticed, 1e30)
    loops.cut = ""
    return errors, found


def rounded_once() -> Results:
    """Of each operator the share of its bf16 outputs that are the value in float64 rounded once. Where a sum or factor between is
    rounded too it is 0.5 to 0.8, and the relative error 2.5e-3, below bf16's limit."""
    tokens, hidden = 20, 96
    x, added, shared, residual, gate, up = torch.randn(6, tokens, hidden).bfloat16().unbind()
    norm_weight, rows = torch.randn(hidden).bfloat16(), torch.randn(2 * tokens, hidden).bfloat16()
    weights, places = torch.rand(tokens, 2), torch.randperm(2 * tokens)
    stream, normed = operators.norm(x, added, norm_weight, 1e-5)
    spread = operators.spread(x, places, 2, weights)[places].view(tokens, 2, hidden)
    whole, copies = stream.double(), rows.double()[places].view(tokens, 2, hidden)
    beside, shares = shared.double() + residual.double(), weights.double().unsqueeze(2)
    out, lse, sink = torch.randn(2, 5, 3, 16).bfloat16(), torch.randn(2, 3, 5), torch.randn(3)
    found = {
        "norm, its stream": (stream, x.double() + added.double()),
        "norm": (normed, normed_exactly(whole, norm_weight)),
        "swiglu": (operators.swiglu([gate, up]), nn.functional.silu(gate.double()) * up.double()),
        "spread": (spread, x.double().unsqueeze(1) * shares),
        "collect": (operators.collect(rows, places, 2, shared, residual), copies.sum(1) + beside),
        "combine": (operators.combine(rows, places, weights, shared, residual), (copies * shares).sum(1) + beside),
        "add_sink": (operators.add_sink(out, lse, sink)[0], add_sink(out.double(), lse.double(), sink.double())[0]),
    } | gradients_and_exact_ones()
    return {name: float((got == rounded(want)).double().mean()) for name, (got, want) in found.items()}


def gradients_and_exact_ones() -> dict[str, tuple[Tensor, Tensor]]:
    """What the backward operators and `norm_rope` make of bf16, beside the same in float64."""
    tokens, hidden = 20, 96
    x, dout, beside, gate, up = torch.randn(5, tokens, hidden).bfloat16().unbind()
    weight, router = torch.randn(hidden).bfloat16(), 0.2 * torch.randn(8, hidden).bfloat16()
    exact, exact_gate, exact_up = (tensor.double().requires_grad_() for tensor in (x, gate, up))
    (dx,) = torch.autograd.grad(normed_exactly(exact, weight), exact, dout.double())
    dgate_up = torch.autograd.grad(nn.functional.silu(exact_gate) * exact_up, [exact_gate, exact_up], dout.double())
    dweights, rule = torch.randn(tokens, 2), (True, True, 1.5)
    _, indices, _, kept = operators.route(x, router, torch.zeros(8), None, 2, 1, 1, *rule)
    scores = (exact @ router.double().T).sigmoid().gather(1, indices)
    (routed,) = torch.autograd.grad(1.5 * scores / scores.sum(1, keepdim=True), exact, dweights.double())
    logits, targets = torch.randn(tokens, 50).bfloat16(), torch.randint(0, 50, (tokens,))
    exact_logits = logits.double().requires_grad_()
    (0.3 * nn.functional.cross_entropy(exact_logits, targets, reduction="sum")).backward()
    operators.cross_entropy_(logits, targets, torch.tensor(0.3), 0.0, True, -100)  # into their place
    turns, weights = torch.randn(2, tokens, 16), torch.randn(2, 16).bfloat16().unbind()
    (q, k), (dq, dk) = ([torch.randn(tokens, heads, 16).bfloat16() for heads in (4, 2)] for _ in range(2))
    exact_qk = [tensor.double().requires_grad_() for tensor in (q, k)]
    turned = [turned_exactly(tensor, weight, *turns) for tensor, weight in zip(exact_qk, weights, strict=True)]
    turned_back = torch.autograd.grad(turned, exact_qk, [dq.double(), dk.double()])
    ours_qk = (
        *operators.norm_rope(q, k, weights, *turns, 1e-5),
        *operators.norm_rope_backward(dq, dk, q, k, weights, *turns, 1e-5)[:2],
    )
    ours_dgate_up = operators.swiglu_backward(dout, [gate, up], False)[:2]
    return {
        "norm_backward": (operators.norm_backward(dout, beside, x, weight, 1e-5)[0], dx + beside),
        "route_backward": (operators.route_backward(dweights, beside, x, router, kept, indices, *rule)[0], routed + beside),
        "cross_entropy_": (logits, exact_logits.grad),
        **{f"swiglu_backward {i}": pair for i, pair in enumerate(zip(ours_dgate_up, dgate_up, strict=True))},
        **{f"norm_rope {i}": pair for i, pair in enumerate(zip(ours_qk, (*turned, *turned_back), strict=True))},
    }


def normed_exactly(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


def turned_exactly(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = normed_exactly(x, weight)
    return normed * cos.double().unsqueeze(1) + normed.roll(x.shape[-1] // 2, -1) * sin.double().unsqueeze(1)


def rounded(x: Tensor) -> Tensor:
    """To bf16 as a kernel does it: Triton's interpreter cuts bits off, a GPU rounds to the nearest."""
    x = x.float()
    return x.bfloat16() if x.is_cuda else (x.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()


def edges() -> dict[str, bool]:
    """Of values that random numbers never have: whether what comes out is right."""
    found = {}
    underflowed = torch.tensor([[0.0, 0.5]])  # an expert's weight of 0
    found["a weight of 0"] = operators.weight_gradient(torch.tensor([0.0, 2.0]), torch.arange(2), underflowed).tolist() == [[0, 4]]

    logits, target = torch.tensor([[300.0, 299.0, -300.0]]), torch.tensor([0])  # past exp's fp32
    loss = operators.cross_entropy_(logits.clone(), target, torch.ones(()), 0.0, True, -100)
    found["large logits"] = torch.allclose(loss, nn.functional.cross_entropy(logits, target), atol=1e-4)  # fp32's at 300

    out, lse, sink = torch.ones(1, 1, 1, 16), torch.full((1, 1, 1), -60.0), torch.full((1,), 60.0)
    found["a sink far above all scores"] = operators.add_sink(out, lse, sink)[1].item() == 60

    high = torch.full((1,), 100.0)  # past exp's fp32, where a position past the end would count
    found["the gradient of a sink of 100"] = operators.sink_gradient(out, out, high.view(1, 1, 1), high).item() == -16

    x, gate, bias = torch.ones(2, 32), torch.full((8, 32), -10.0), torch.zeros(8)  # sigmoid(-320) is 0 in fp32
    rule = (2, 1, 1, True, True, 1.0)
    weights, indices, _, kept = operators.route(x, gate, bias, None, *rule)
    dx, dgate = operators.route_backward(torch.ones_like(weights), None, x, gate, kept, indices, *rule[3:])
    found["all scores are 0"] = not (weights.any() or dx.any() or dgate.any())

    _, indices, counts, _ = operators.route(x * torch.nan, gate, bias, None, *rule)
    found["logits that are no numbers choose experts that are there"] = bool((indices < 8).all()) and int(counts.sum()) == 4

    # Group 0 has 1 and 0, group 1 twice 0.98: who leaves out both of two equal bests takes group 0.
    scores = torch.tensor([8.0, -90, -90, -90, 4, 4, -90, -90])
    _, indices, _, _ = operators.route(torch.ones(1, 1), scores[:, None], bias, None, 1, 2, 1, True, False, 1.0)
    found["two equal bests of a group"] = indices.tolist() == [[4]]

    # The first expert's lift is 1, the last bin's upper end; past it lies the second's first bin.
    histogram = torch.zeros(4, 8, dtype=torch.int64)
    operators.add_lift_(histogram, torch.tensor([[-90.0, 90, 90, 90]]), torch.zeros(4), 1, 1, 1, True)
    found["the largest lift"] = histogram.nonzero().tolist() == [[0, 7], [1, 4], [2, 4], [3, 4]]
    return found


def impossible_targets() -> float:
    """0 if a target past the vocabulary, or below 0, makes its loss no number and leaves its neighbours' alone; else 1."""
    logits, scale = torch.randn(4, 50), torch.ones(())
    targets = torch.tensor([3, 50, -1, -100])
    losses = operators.cross_entropy_(logits.clone(), targets, scale, 0.0, True, -100)
    plain = torch.nn.functional.cross_entropy(logits[:1], targets[:1])
    right = losses[1:3].isnan().all() and losses[3] == 0 and (losses[0] - plain).abs() < 1e-5
    return 0.0 if right else 1.0


def loss_under_autocast(device: str) -> float:
    """As `Trainer(bf16=True)` has it: weights and states of fp32."""

    def call(x: Tensor, head: Tensor, targets: Tensor) -> Sequence[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=x.dtype == torch.float32):
            return [token_loss(x, head, targets, None, 0.1)]

    return both_ways(call, (random(9, 96), random(50, 96) / 8, torch.randint(0, 50, (9,))), torch.float32)


def ties() -> float:
    """Equal scores go to the lower index."""
    config = MoEGPTConfig.preset("tiny", n_routed_experts=8, n_group=4, topk_group=2)
    inputs = torch.randn(5, config.hidden_size), torch.zeros(8, config.hidden_size), torch.zeros(8)
    chosen = [routed(config, False, *(x.to(dtype) for x in inputs))[1] for dtype in (torch.float32, torch.float64)]
    return error(*chosen)


def lifts(rules: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each rule the furthest, in bins, that the kernel puts a token's lift from where float64 does. Infinite where the counts of
    all tokens at once are not the sum of each alone, or one lift in fifty is moved: few lie next to a bin's end."""
    found = {}
    for rule in rules:
        config = MoEGPTConfig.preset("tiny", router_balance="quantile", **rule)
        logits, bias = 2 * random(20, config.n_routed_experts), 0.3 * random(config.n_routed_experts)
        alone, plain = (
            torch.stack([counted_lifts(config, row, bias, dtype) for row in logits.split(1)])
            for dtype in (torch.float32, torch.float64)
        )
        assert (
            bool((plain.sum(dim=-1) == 1).all()) and plain.sum(dim=0).gt(0).sum() > 2 * config.n_routed_experts
        )  # all over the bins
        moved = (alone.argmax(dim=-1) - plain.argmax(dim=-1)).abs()
        whole = torch.equal(counted_lifts(config, logits, bias, torch.float32), alone.sum(dim=0))
        found[f"lifts {rule}"] = float(moved.max()) if whole and moved.count_nonzero() < moved.numel() / 50 else float("inf")
    return found


def counted_lifts(config: MoEGPTConfig, logits: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    gate = Gate(config)
    gate.e_score_correction_bias = bias.to(dtype)
    gate.observe(logits.to(dtype), gate.load_E)
    assert gate.lift_EN is not None
    return gate.lift_EN


class FirstCalls(TorchDispatchMode):
    """The arguments of the first call of each operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_gpt" and (name := func._schema.name.removeprefix("moe_gpt::")) not in self.arguments:
            copies = tree_map_only(Tensor, lambda x: x.detach().clone(), args)  # one writes into its argument
            self.arguments[name] = func, copies
        return func(*args, **(kwargs or {}))


def operator_faults(calls: FirstCalls) -> dict[str, str]:
    """By operator what a compiler would be told wrongly: shapes, dtypes, strides, what it writes to."""
    found = {}
    for name, (func, args) in calls.arguments.items():
        results = opcheck(func, args, test_utils=("test_schema", "test_faketensor"), raise_exception=False)
        found[name] = "; ".join(f"{test}: {result}" for test, result in results.items() if result != "SUCCESS")
    return found


def compiled(config: MoEGPTConfig) -> tuple[float, list[str]]:
    """What `--compile` takes of a block, with the kernels: the error beside eager, and the operators in its graphs."""
    torch.manual_seed(0)
    block = MoEGPTForCausalLM(config).model.layers[0].train()
    nn.init.normal_(block.self_attn.sinks)
    x, angles = torch.randn(1, 8, config.hidden_size), torch.rand(1, 8, config.head_dim)
    mask = causal_mask((1, 8), 0, x.device, None, None)
    names: set[str] = set()

    def watched(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.update(str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("moe_gpt."))
        return make_boxed_func(graph.forward)

    region = torch.compile(block.attend, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=watched))
    results = []
    for call in (block.attend, region):
        block.zero_grad()
        given = x.clone().requires_grad_()
        stream, normed = call(given, (angles.cos(), angles.sin()), mask, None, False)
        (stream.square().sum() + (3 * normed).square().sum()).backward()
        results.append([stream.detach(), normed.detach(), given.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    return max(map(error, *results)), sorted(names)


def main() -> None:
    on_gpu = "--gpu" in sys.argv
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.use_deterministic_algorithms(not on_gpu)  # which begins new memory as NaN: what a kernel leaves out is seen
    torch.manual_seed(0)
    operators.fits = with_kernels
    grouped.lacks_grouped_mm = lambda device: True
    found, said, calls = {}, {}, FirstCalls()
    for dtype in (torch.float32, torch.bfloat16):
        with calls:
            found |= of(partial(cases, dtype), dtype)
        if on_gpu:
            found |= {f"{name}, real sizes": value for name, value in of(real_cases, dtype).items()}
    found["bfloat16: loss under autocast"] = loss_under_autocast("cuda" if on_gpu else "cpu")
    found["ties"] = ties()
    found["impossible targets"] = impossible_targets()
    with calls:
        moved = lifts(LIFT_RULES)
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=2, hidden_size=64, vocab_size=128, z_loss_weight=1e-3)
    if not on_gpu:  # no grouped product and no flash attention there in fp32 and float64
        ours, plain = (model_step(config, dtype) for dtype in (torch.float32, torch.float64))
        assert ours.keys() == plain.keys() and len(ours) > 20
        found["float32: a model's loss and gradients"] = max(error(ours[name], plain[name]) for name in plain)
    used = {name for name in KERNELS if f"model.kernels.{name}" in sys.modules}
    assert used == set(KERNELS), used
    if not on_gpu:
        errors, loops = going_round()
        found |= errors
        found["compiled"], graphs = compiled(config)
        said = {"loops": loops, "operators": operator_faults(calls), "graphs": graphs}
    json.dump({"errors": found, "lifts": moved, "rounded": rounded_once(), "edges": edges(), **said}, sys.stdout)


if __name__ == "__main__":
    main()
