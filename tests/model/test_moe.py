"""Experts, dispatch and combine against their formula, forward and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import MoEGPTConfig
from model.dispatch import (
    chunks,
    combine,
    expert_order,
    gather_rows,
    grouped_linear,
    grouped_linears,
    joined,
    row_dots,
    scale_rows,
    swiglu,
    tally,
)
from model.grouped import OURS, Products
from model.moe import MoE
from tests import reference
from tests.model.small_moe import config, initialised


def expected_output(moe: MoE, c: MoEGPTConfig, x_TH: Tensor) -> Tensor:
    logits = (x_TH @ moe.gate.weight.T).tolist()
    bias = moe.gate.e_score_correction_bias.tolist()
    rule = (c.num_experts_per_tok, c.n_group, c.topk_group, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor)
    chosen = [reference.route_token(row, bias, *rule) for row in logits]
    # The same choice with weights that autograd sees.
    scores = 1 / (1 + torch.exp(-(x_TH @ moe.gate.weight.T)))
    weights = []
    for token, experts in enumerate(chosen):
        total = sum(scores[token, e] for e in experts)
        weights.append({e: scores[token, e] / total for e in experts})
    shared = moe.shared_experts
    routed = reference.mixture(x_TH, weights, moe.experts.gate_up_proj, moe.experts.down_proj)
    return routed + reference.swiglu(x_TH, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)


@pytest.mark.parametrize("case", ["spread", "all to one pair", "one token"])
def test_forward_and_all_gradients_against_the_formula(case: str) -> None:
    c = config()
    moe = initialised(c)
    tokens = 1 if case == "one token" else 40
    x = torch.randn(1, tokens, 32, dtype=torch.float64, requires_grad=True)
    if case == "all to one pair":
        moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0, 0, 0, 100, 100, 0, 0]))
    out = moe(x)
    load = moe.gate.load_E
    assert int(load.sum()) == tokens * 2
    if case == "all to one pair":
        assert load.tolist() == [0, 0, 0, 0, tokens, tokens, 0, 0]
    if case != "spread":
        assert (load == 0).any()  # empty experts are part of the case
    expected = expected_output(moe, c, x[0])
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-12)
    dout, leaves = torch.randn_like(out), [x, *moe.parameters()]
    ours = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(expected, leaves, dout[0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


def test_dispatch_and_combine_undo_each_other() -> None:
    x_TH, indices_TK = torch.randn(300, 8, dtype=torch.float64), torch.randint(0, 5, (300, 3))
    order_R, place_R = expert_order(indices_TK)
    rows_RH = gather_rows(x_TH, order_R, place_R, 3)
    assert (indices_TK.flatten()[order_R].diff() >= 0).all()
    weights_TK = torch.rand(300, 3, dtype=torch.float64)
    out = combine(rows_RH, order_R, place_R, weights_TK, None, None)
    torch.testing.assert_close(out, x_TH * weights_TK.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 700])  # 700 are several passes of the plain sums
@pytest.mark.parametrize("others", ["both", "residual", "none"])
def test_combine_and_its_gradients_against_the_formula(dtype: torch.dtype, tokens: int, others: str) -> None:
    top_k, hidden = 3, 16
    order_R, place_R = expert_order(torch.randint(0, 5, (tokens, top_k)))
    wide = torch.promote_types(dtype, torch.float32)
    rows = torch.randn(tokens * top_k, hidden, dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, top_k, dtype=wide)
    shared, residual = (torch.randn(tokens, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    given = [shared if others == "both" else None, None if others == "none" else residual]
    out = combine(rows, order_R, place_R, weights, *given)
    expected = sum((x.double() for x in given if x is not None), torch.zeros(tokens, hidden, dtype=torch.float64))
    for t in range(tokens):
        for k in range(top_k):
            row = int((order_R == t * top_k + k).nonzero())
            expected = expected.index_add(0, torch.tensor([t]), (weights[t, k].double() * rows[row].double()).unsqueeze(0))
    leaves, dout = [rows, *(x for x in given if x is not None)], torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout.double())
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for a, b in zip([out, *ours], [expected, *theirs], strict=True):
        assert float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()) < limit


@pytest.mark.parametrize("others", ["both", "none"])
def test_the_sum_of_a_token_is_rounded_once(others: str) -> None:
    """To the bf16 number that is nearest to the exact sum, but where the fp32 sum falls on the other side of a tie."""
    tokens, top_k, hidden = 300, 3, 32
    order_R, place_R = expert_order(torch.randint(0, 5, (tokens, top_k)))
    rows, weights = torch.randn(tokens * top_k, hidden).bfloat16(), torch.rand(tokens, top_k)
    given = [torch.randn(tokens, hidden).bfloat16() if others == "both" else None for _ in range(2)]
    exact = (rows.double()[place_R].view(tokens, top_k, hidden) * weights.double().unsqueeze(-1)).sum(dim=1)
    exact += sum(x.double() for x in given if x is not None)
    assert float((combine(rows, order_R, place_R, weights, *given) != exact.bfloat16()).double().mean()) < 0.01


def test_the_products_of_rows_are_fp32() -> None:
    """Of which the routers' gradient is made; and a row times its weight is rounded once."""
    a, b = torch.randn(600, 64).bfloat16(), torch.randn(600, 64).bfloat16()
    found = row_dots(a, b, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (a.double() * b.double()).sum(dim=1), rtol=1e-5, atol=1e-5)
    scale, exact = torch.rand(600), a.double()
    exact *= scale.double().unsqueeze(1)
    assert float((scale_rows(a, scale) != exact.bfloat16()).double().mean()) < 0.001


def test_a_cpu_passes_over_rows_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose fp32 copies stay in its cache; a GPU has a kernel for each, and a graph all of them."""
    assert chunks(700, torch.empty(0)) == [slice(0, 256), slice(256, 512), slice(512, 768)]
    assert chunks(700, torch.empty(0, device="meta")) == [slice(0, 700)]
    assert chunks(0, torch.empty(0, device="meta")) == chunks(0, torch.empty(0)) == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chunks(700, torch.empty(0)) == [slice(0, 700)]


def test_a_rows_tally_is_fp32_whatever_its_rows() -> None:
    gate, up, dout = (torch.randn(600, 64).bfloat16().requires_grad_() for _ in range(3))
    weights = torch.ones(600, 1, requires_grad=True)
    out = swiglu(gate, up, tally_R=tally(weights, torch.arange(600)))
    dup, dweights = torch.autograd.grad(out, [up, weights], dout)
    torch.testing.assert_close(dweights[:, 0].double(), (up.double() * dup.double()).sum(dim=1), rtol=1e-5, atol=1e-5)


def rows_way(hidden_size: int, width: int, weights: Tensor, given: list[Tensor], order: Tensor, place: Tensor) -> Tensor:
    """Rows through two products to their tokens, as the layers do it; `given` are rows, gate and up, down."""
    rows, gate_up, down = given
    ends = torch.tensor([rows.shape[0]], dtype=torch.int32)
    hidden = swiglu(grouped_linear(rows, ends, gate_up.unsqueeze(0)), tally_R=tally(weights, place))
    return combine(grouped_linear(hidden, ends, down.unsqueeze(0)), order, place, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 700])
def test_the_weights_gradient_comes_from_the_hidden_activations(dtype: torch.dtype, tokens: int) -> None:
    """Against the formula in float64, in which it comes from the experts' output; with weights from nothing to 1."""
    top_k, hidden, width = 3, 16, 8
    order, place = expert_order(torch.randint(0, 5, (tokens, top_k)))
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(tokens, top_k, dtype=wide)
    weights[0, 0], weights[1, 1] = 1e-12, 0
    weights.requires_grad_()
    shapes = (tokens * top_k, hidden), (2 * width, hidden), (hidden, width)
    given = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    out = rows_way(hidden, width, weights, given, order, place)
    rows, gate_up, down = (x.double() for x in given)
    gate, up = (rows @ gate_up.mT).chunk(2, dim=1)
    results = (gate / (1 + torch.exp(-gate)) * up) @ down.mT
    expected = (results[place].view(tokens, top_k, hidden) * weights.double().unsqueeze(-1)).sum(dim=1)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, [weights, *given], dout)
    theirs = torch.autograd.grad(expected, [weights, *given], dout.double())
    limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    assert theirs[0][1, 1] and ours[0][1, 1] == 0  # a weight of 0 is a score of 0, which a sigmoid no longer moves
    scored = theirs[0].clone()
    scored[1, 1] = 0
    for a, b in zip(ours, [scored, *theirs[1:]], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < limit
    tiny = float(theirs[0][0, 0])
    assert abs(float(ours[0][0, 0]) - tiny) < 10 * limit * float(theirs[0].abs().mean())


def test_no_tally_where_nobody_wants_it() -> None:
    weights, place = torch.rand(4, 2), torch.arange(8)
    assert tally(weights, place) is None
    with torch.no_grad():
        assert tally(weights.requires_grad_(), place) is None


@pytest.mark.parametrize("packed", [True, False])
def test_swiglu_and_its_gradient_against_the_formula(packed: bool) -> None:
    given = [torch.randn(20, 2 * 8 if packed else 8, dtype=torch.float64, requires_grad=True) for _ in range(1 if packed else 2)]
    gate, up = given[0].chunk(2, dim=-1) if packed else given
    dout = torch.randn(20, 8, dtype=torch.float64)
    out, expected = swiglu(*given), gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(out, expected)
    ours, theirs = torch.autograd.grad(out, given, dout), torch.autograd.grad(expected, given, dout)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(32, 24), (32, 20), (30, 24)])  # the last two are not aligned to 16 bytes in bf16
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("experts", [1, 8])
def test_grouped_product_equals_one_expert_at_a_time(dtype: torch.dtype, sizes: tuple[int, int], halves: int, experts: int) -> None:
    counts = torch.tensor([5, 0, 17, 0, 0, 1, 9, 0]) if experts == 8 else torch.tensor([32])
    x = torch.randn(32, sizes[0], dtype=dtype, requires_grad=True)
    weights = [torch.randn(experts, sizes[1], sizes[0], dtype=dtype, requires_grad=True) for _ in range(halves)]
    out = torch.cat(grouped_linears(x, counts.cumsum(0, dtype=torch.int32), *weights), dim=1)
    expert = torch.repeat_interleave(torch.arange(experts), counts)
    expected = torch.cat([torch.einsum("ra,rba->rb", x.double(), w.double()[expert]) for w in weights], dim=1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    dout = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, [x, *weights], dout)]
    theirs = [expected, *torch.autograd.grad(expected, [x, *weights], dout.double())]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < tolerance
    for gradient in ours[2:]:
        assert not gradient[counts == 0].any() and gradient.isfinite().all()


def test_no_row_for_any_expert() -> None:
    """A rank to which nobody sent a row: gradients of 0, not none."""
    x = torch.randn(0, 16, requires_grad=True)
    weights = [torch.randn(4, 8, 16, requires_grad=True) for _ in range(2)]
    out = torch.cat(grouped_linears(x, torch.zeros(4, dtype=torch.int32), *weights), dim=1)
    assert out.shape == (0, 16)
    for gradient in torch.autograd.grad(out.sum(), weights):
        assert gradient.shape == (4, 8, 16) and not gradient.any()


def test_two_weights_are_one_product_off_the_cpu() -> None:
    weights = [torch.empty(4, 8, 16), torch.empty(4, 8, 16)]
    assert len(joined(weights, 1000)) == 2
    on_gpu = [weight.to("meta") for weight in weights]
    (whole,) = joined(on_gpu, 65)
    assert whole.shape == (4, 16, 16)
    assert joined(on_gpu[:1], 65)[0] is on_gpu[0]  # not copied
    assert len(joined(on_gpu, 64)) == 2  # where their copy is more than the rows


def test_joined_or_apart_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way on a CPU."""
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, width, 16, dtype=torch.float64, requires_grad=True) for width in (8, 6)]
    ends = torch.tensor([5, 5, 12, 20], dtype=torch.int32)
    results = []
    for join in (joined, lambda weights, rows: [torch.cat(tuple(weights), dim=1)]):
        monkeypatch.setattr("model.dispatch.joined", join)
        parts = grouped_linears(x, ends, *weights)
        results.append([len(parts), torch.cat(parts, dim=1)])
        results[-1] += torch.autograd.grad(results[-1][1].square().sum(), [x, *weights])
    (apart, *first), (whole, *second) = results
    assert (apart, whole) == (2, 1)
    torch.testing.assert_close(first, second)


def test_somebody_elses_products_are_taken_in_every_direction() -> None:
    """Of which the numbers say nothing: they are the same."""
    calls: list[str] = []

    def watched(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: calls.append(name) or call(*given)  # type: ignore[func-returns-value]

    by = Products(watched("product", OURS.product), watched("outer", OURS.outer))
    x, ends = torch.randn(6, 16, requires_grad=True), torch.tensor([2, 6], dtype=torch.int32)
    weights = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(2)]
    torch.cat(grouped_linears(x, ends, *weights, by=by), dim=1).square().sum().backward()
    assert calls == ["product"] * 4 + ["outer"] * 2
    with torch.no_grad():
        grouped_linears(x, ends, *weights, by=by)
    assert calls[6:] == ["product"] * 2


def test_expert_dropout_only_in_training() -> None:
    c = config(expert_dropout=0.5)
    moe = initialised(c)
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    first, second = moe(x), moe(x)
    assert not torch.equal(first, second)
    moe.eval()
    torch.testing.assert_close(moe(x)[0], expected_output(moe, c, x[0]), rtol=1e-10, atol=1e-12)
    # Unbiased: the mean over many masks is the output without dropout.
    moe.train()
    mean = torch.stack([moe(x) for _ in range(600)]).mean(dim=0)
    moe.eval()
    assert (mean - moe(x)).norm() / moe(x).norm() < 0.1
