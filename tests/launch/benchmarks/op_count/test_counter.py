"""Counts of operations whose bytes and FLOPs are known by formula, on `meta` tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn

from launch.benchmarks.op_count.counter import Count, OpCounts, declare
from launch.benchmarks.op_count.cuda_kernels import as_on_cuda, counted_restore, prefers_triton
from model import operators
from model.dispatch import combine, expert_order, gather_rows, grouped_linear, swiglu

T, H, W, E, K = 64, 32, 48, 4, 2
N, M, D = 6, 2, 16
BF16, FP32, INT32, INT64 = 2, 4, 4, 8


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def count(call: object, parts: dict[nn.Module, str] | None = None) -> OpCounts:
    with Count(parts) as counted:
        out = call()  # type: ignore[operator]
        counted.end_forward()
        out.backward(torch.empty_like(out))
    return counted.counts


def of(counts: OpCounts, name: str, backward: bool = False) -> tuple[float, int]:
    """FLOPs and bytes of the operations of that name."""
    chosen = [e for e in counts.entries if e.name == name and e.backward == backward]
    assert chosen, (name, [(e.name, e.backward) for e in counts.entries])
    return sum(e.flops for e in chosen), sum(e.bytes for e in chosen)


def test_a_product_and_its_two_gradients() -> None:
    x, weight = tensor(T, H), tensor(W, H)
    counts = count(lambda: F.linear(x, weight))
    one = (T * H + W * H + T * W) * BF16
    assert of(counts, "mm") == (2 * T * H * W, one)
    assert of(counts, "mm", backward=True) == (2 * 2 * T * H * W, 2 * one)


def test_a_product_into_a_given_tensor() -> None:
    """As the loss makes its gradients: what `out=` names is no factor, and written once."""
    x, weight, out = tensor(T, W), tensor(W, H), torch.empty(T, H, dtype=torch.bfloat16, device="meta")
    with Count() as counted, torch.no_grad():
        torch.mm(x, weight, out=out)
    assert of(counted.counts, "mm") == (2 * T * W * H, (T * W + W * H + T * H) * BF16)


def test_a_grouped_product_and_its_two_gradients() -> None:
    x, weight, ends = tensor(T, H), tensor(E, W, H), tensor(E, dtype=torch.int32)
    counts = count(lambda: grouped_linear(x, ends, weight))
    one = (T * H + E * W * H + T * W) * BF16 + E * 4
    assert of(counts, "_grouped_mm") == (2 * T * H * W, one)
    assert of(counts, "_grouped_mm", backward=True) == (2 * 2 * T * H * W, 2 * one)


def test_a_grouped_product_where_torch_has_a_loop() -> None:
    """Forward, input's and weight's gradient: a copy to the host that it waits for, then a product for each expert. FLOPs and bytes
    are those of one kernel; the ends go to the host in place of the product."""
    ledgers = []
    for capability in ((9, 0), (8, 0)):
        x, weight, ends = tensor(T, H), tensor(E, W, H), tensor(E, dtype=torch.int32)
        with as_on_cuda(T, capability):
            ledgers.append(count(partial(F.grouped_mm, x, weight.mT, offs=ends)))
    kernel, loop = ledgers
    assert [entry.name for entry in kernel.entries] == 3 * ["_grouped_mm"] and not kernel.host_waits
    assert [entry.name for entry in loop.entries] == 3 * (["copy_"] + E * ["mm"]) and loop.host_waits.total() == 3
    shapes = Counter(entry.shape for entry in loop.entries if entry.name == "mm")
    assert shapes == {(T // E, H, W, 1): E, (T // E, W, H, 1): E, (W, T // E, H, 1): E}
    assert loop.total("flops") == kernel.total("flops") == 3 * 2 * T * H * W
    assert loop.total("bytes") == kernel.total("bytes") == 3 * ((T * H + E * W * H + T * W) * BF16 + E * INT32)


def test_the_peers_experts_before_hopper() -> None:
    """AutoEP's: no loop but DeepSpeed's kernels, a small one before each: gate, up and down, forward and two gradients."""
    with mock.patch.object(type(get_accelerator()), "prefer_triton_grouped_mm", lambda _: prefers_triton((8, 0))):
        experts = GroupedExperts(H, W, E).to(device="meta", dtype=torch.bfloat16)
    with as_on_cuda(T, (8, 0)):
        counts = count(partial(experts, tensor(T, H), torch.empty(E, dtype=torch.int64, device="meta")))
    products = [entry for entry in counts.entries if entry.kind == "matrix product"]
    assert len(products) == 9 and all(entry.name.startswith("triton group gemm") for entry in products)
    assert sum(entry.name == "triton group meta" for entry in counts.entries) == 9 and not counts.host_waits
    assert sum(entry.flops for entry in products) == 3 * 3 * 2 * T * H * W
    one = (T * H + E * W * H + T * W) * BF16 + 2 * E * INT32
    assert sum(entry.bytes for entry in products) == 9 * one
    assert {entry.shape for entry in products} == {(T, H, W, E), (T, W, H, E), (H, T, W, E), (W, T, H, E)}


@pytest.mark.parametrize(
    ("capability", "triton"), [((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), False), (None, False)]
)
def test_whose_product_autoep_takes(capability: tuple[int, int] | None, triton: bool) -> None:
    """By DeepSpeed's code, of the card and not of this host."""
    assert prefers_triton(capability) is triton


def test_elementwise_reads_each_input_once_and_writes_once() -> None:
    a, b = tensor(T, H), tensor(T, H, dtype=torch.float32)
    assert of(count(lambda: a * b), "mul") == (0, T * H * (BF16 + FP32 + FP32))
    row = tensor(1, H)
    assert of(count(lambda: a * row.expand(T, H)), "mul")[1] == (2 * T * H + H) * BF16  # an expanded input once


def test_views_and_allocations_cost_nothing() -> None:
    x = tensor(T, H)
    with Count() as counted:
        x.view(H, T).transpose(0, 1).unflatten(0, (2, -1))
        torch.empty_like(x)
    assert counted.counts.entries == []


def test_in_place_and_out_are_not_counted_twice() -> None:
    with Count() as counted, torch.no_grad():
        x, y = tensor(T, H), tensor(T, H)
        out = torch.empty(T, H, dtype=torch.bfloat16, device="meta")
        torch.mul(x, y, out=out)
        x.add_(y)
        out.zero_()
    assert [e.bytes for e in counted.counts.entries if e.name in ("mul", "add_", "zero_")] == [
        3 * T * H * BF16,
        3 * T * H * BF16,
        T * H * BF16,
    ]


def test_a_gather_reads_the_rows_it_takes() -> None:
    source, index = tensor(1000 * T, H), tensor(T, dtype=torch.int64)
    assert of(count(lambda: source.index_select(0, index)), "index_select")[1] == 2 * T * H * BF16 + T * INT64


def test_swiglu_keeps_its_input_alone() -> None:
    gate_up = tensor(T, 2 * W)
    with Count() as counted:
        hidden = swiglu(gate_up * 1)
        counted.end_forward()
    assert counted.counts.held == (T * 2 * W + T * W) * BF16 and hidden.shape == (T, W)


def test_host_waits_launches_and_declared_kernels() -> None:
    x = tensor(T, H)
    with Count() as counted:
        declare("a kernel of CUDA's", "norm", [x, None], [x], flops=5.0, launches=3)
    (entry,) = counted.counts.entries
    assert (entry.bytes, entry.flops, entry.launches, entry.kind) == (2 * T * H * BF16, 5.0, 3, "norm")
    declare("outside of a count", "norm", [x], [x])  # goes nowhere


def test_backward_belongs_to_the_module_of_its_forward() -> None:
    first, second = nn.Linear(H, W, device="meta"), nn.Linear(W, H, device="meta")
    x = tensor(T, H, dtype=torch.float32)
    counts = count(lambda: second(first(x).relu()), {first: "first", second: "second"})
    products = [(e.part, e.backward) for e in counts.entries if e.name in ("mm", "addmm")]
    assert sorted(products) == sorted([(p, b) for p in ("first", "second") for b in (False, True, True)])
    assert {e.part for e in counts.entries if "relu" in e.name or "threshold" in e.name} == {"other"}


def test_the_kernels_operators_cost_what_their_shapes_say() -> None:
    x, stream, weight, places = tensor(T, H), tensor(T, H), tensor(H), tensor(T * K, dtype=torch.int64)
    rows, weights = tensor(T * K, H), tensor(T, K, dtype=torch.float32)
    gate, logits = tensor(E, H), tensor(T, E, dtype=torch.float32)
    index, wide, one = tensor(T, K, dtype=torch.int64), tensor(T, W), tensor(dtype=torch.float32)
    q, k, heads, cos = tensor(T, N, D), tensor(T, M, D), [tensor(D), tensor(D)], tensor(T // 2, D, dtype=torch.float32)
    turned, tables = T * (N + M) * D * BF16, T // 2 * D * FP32
    out, lse, sinks = tensor(2, T // 2, N, D), tensor(2, N, T // 2, dtype=torch.float32), tensor(N)
    long, long_lse = tensor(3, 70, N, D), tensor(3, N, 70, dtype=torch.float32)
    token, index_bytes = T * H * BF16, T * K * INT64
    calls = {
        "norm": (lambda: operators.norm(x, stream, weight, 1e-5), 1, 4 * token + H * BF16),
        # dout, dstream, x, weight; dx, dweight; of each token a row of partial sums written and read
        "norm_backward": (lambda: operators.norm_backward(x, x, x, weight, 1e-5), 2, 4 * token + 2 * H * BF16 + 2 * T * H * FP32),
        "norm_rope": (lambda: operators.norm_rope(q, k, heads, cos, cos, 1e-5)[0], 1, 2 * turned + 2 * D * BF16 + 2 * tables),
        # dq, dk, q, k, two weights, two tables; dq, dk, two dweights in fp32; of each token partial sums of both written and read
        "norm_rope_backward": (
            lambda: operators.norm_rope_backward(q, k, q, k, heads, cos, cos, 1e-5)[2],
            2,
            3 * turned + 2 * D * BF16 + 2 * tables + 2 * D * FP32 + 2 * T * 2 * D * FP32,
        ),
        "add_sink": (lambda: operators.add_sink(out, lse, sinks)[0], 1, 2 * T * N * (D * BF16 + FP32) + N * BF16),
        # dout, out, lse, sinks; dsinks; a partial sum of 64 positions of each head, of one row's 70 positions two, written and read
        "sink_gradient": (
            lambda: operators.sink_gradient(long, long, long_lse, sinks),
            2,
            3 * 70 * N * (2 * D * BF16 + FP32) + 2 * N * BF16 + 2 * 3 * 2 * N * FP32,
        ),
        "spread": (lambda: operators.spread(x, places, K, weights), 1, (1 + K) * token + index_bytes + T * K * FP32),
        "collect": (lambda: operators.collect(rows, places, K, x, x), 1, (K + 3) * token + index_bytes),
        "combine": (
            lambda: operators.combine(rows, places, weights, x, x),
            1,
            (K + 3) * token + index_bytes + T * K * FP32,
        ),
        "weight_gradient": (
            lambda: operators.weight_gradient(weights.view(-1), places, weights),
            1,
            3 * T * K * FP32 + index_bytes,
        ),
        "swiglu": (lambda: operators.swiglu([wide, wide]), 1, 3 * T * W * BF16),
        "swiglu_backward": (lambda: operators.swiglu_backward(wide, [wide, wide], True)[2], 1, 5 * T * W * BF16 + T * FP32),
        "route": (
            lambda: operators.route(x, gate, tensor(E, dtype=torch.float32), None, K, 1, 1, True, True, 1.0),
            2,
            token + E * H * BF16 + E * FP32 + T * (K + E) * FP32 + index_bytes + E * INT64,
        ),
        "route_backward": (
            lambda: operators.route_backward(weights, x, x, gate, logits, index, True, True, 1.0),
            3,  # x for dweight, beside, dx; logits; dlogits written and read; 32 shares of dweight written and read
            3 * token + T * (K + 3 * E) * FP32 + index_bytes + 2 * E * H * BF16 + 2 * 32 * E * H * FP32,
        ),
        "add_lift_": (
            lambda: operators.add_lift_(tensor(E, 1000, dtype=torch.int64), logits, tensor(E, dtype=torch.float32), K, 1, 1, True),
            1,  # the bins are read and written
            T * E * FP32 + E * FP32 + 2 * 1000 * E * INT64,
        ),
        "cross_entropy_": (
            lambda: operators.cross_entropy_(wide, tensor(T, dtype=torch.int64), one, 0.0, True, -100),
            1,
            3 * T * W * BF16 + T * INT64 + FP32 + T * FP32,
        ),
    }
    for name, (call, launches, wanted) in calls.items():
        assert operator(call) == (name, launches, wanted)
    # what is not asked for is not done: weights of the norms, a gradient
    bare = operator(lambda: operators.norm_rope_backward(q, k, q, k, [], cos, cos, 1e-5)[0])
    assert bare == ("norm_rope_backward", 1, 2 * turned + 2 * tables)  # neither q nor k is read
    loss = operator(lambda: operators.cross_entropy_(wide, tensor(T, dtype=torch.int64), one, 0.0, False, -100))
    assert loss == ("cross_entropy_", 1, T * W * BF16 + T * INT64 + FP32 + T * FP32)


def operator(call: Callable[[], object]) -> tuple[str, int, int]:
    """Name, kernels and bytes of the one operation that a call is."""
    with Count() as counted, torch.no_grad():
        call()
    (entry,) = counted.counts.entries
    return entry.name, entry.launches, entry.bytes


@pytest.mark.parametrize("others", [0, 2])
def test_a_way_through_the_mixture_runs_on_meta(others: int) -> None:
    x, indices, weights = tensor(T, H), tensor(T, K, dtype=torch.int64), tensor(T, K, dtype=torch.float32)
    more = [tensor(T, H) for _ in range(others)]
    order, inverse = expert_order(indices)
    counts = count(lambda: combine(gather_rows(x, order, inverse, K), order, inverse, weights, *more))
    assert counts.total("launches") > 5 and counts.total("flops") == 0


def test_deepspeeds_weighted_restore_costs_what_its_kernels_touch() -> None:
    """The permutation inverted; rows weighed and summed; back, rows read again for the weights' gradients. A kernel each."""
    rows, scores, order = tensor(T * K, H), tensor(T, K, dtype=torch.float32), tensor(T * K, dtype=torch.int64)
    with Count() as counted:
        out = counted_restore(rows, scores, order, K, (1, T, H))
        out.backward(torch.empty_like(out))
    token, slots, named = T * H * BF16, T * K, {e.name: (e.bytes, e.launches) for e in counted.counts.entries}
    assert named["triton invert index"] == (slots * (INT64 + INT32), 1)
    assert named["triton weighted restore"] == ((K + 1) * token + slots * (FP32 + INT32), 1)
    assert named["triton weighted restore backward"] == ((2 * K + 1) * token + slots * (2 * FP32 + INT32), 1)
