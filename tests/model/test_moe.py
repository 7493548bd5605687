"""Routing against DeepSeek-V3's rule token by token, experts against their formula, recomputation against itself."""

import itertools

import pytest
import torch
from torch import Tensor

from model.config import MoEGPTConfig
from model.moe import MoE, combine, dispatch, grouped_linear
from model.router import Router, RoutingTape, best, choose, count, route, router_logits
from tests import reference

SETTINGS = [
    # experts, top k, groups, chosen groups
    (4, 2, 1, 1),
    (4, 2, 2, 1),
    (8, 2, 4, 2),
    (8, 3, 2, 2),
    (16, 4, 4, 2),
]


def as_lists(weights_TK: Tensor, indices_TK: Tensor) -> list[dict[int, float]]:
    return [dict(zip(i, w, strict=True)) for i, w in zip(indices_TK.tolist(), weights_TK.tolist(), strict=True)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("bias", ["zero", "mixed", "negative"])
def test_equals_deepseeks_rule(setting: tuple[int, int, int, int], scoring: str, normalise: bool, bias: str) -> None:
    experts, top_k, groups, chosen_groups = setting
    logits_TE = torch.randn(200, experts, dtype=torch.float64) * 2
    bias_E = {
        "zero": torch.zeros(experts),
        "mixed": torch.randn(experts),
        "negative": -1.5 - torch.rand(experts),  # every biased score is below 0, where a mask of 0.0 would win
    }[bias].double()
    keywords = {"top_k": top_k, "n_group": groups, "topk_group": chosen_groups, "scoring_func": scoring}
    ours = as_lists(
        *route(logits_TE, bias_E, norm_topk_prob=normalise, routed_scaling_factor=2.5, **keywords)  # type: ignore[arg-type]
    )
    moved = 0
    for row, (logits, one) in enumerate(zip(logits_TE.tolist(), ours, strict=True)):
        theirs = reference.route_token(logits, bias_E.tolist(), top_k, groups, chosen_groups, scoring, normalise, scale=2.5)
        assert list(one) == list(theirs), row  # same experts in the same order
        for expert in one:
            assert one[expert] == pytest.approx(theirs[expert], rel=1e-12)
        best_unbiased = sorted(range(experts), key=lambda e: -logits[e])[:top_k]
        moved += set(best_unbiased) != set(one)
    if bias != "zero" or groups > chosen_groups:
        assert moved > 10  # bias and groups did change choices


def test_ties_go_to_the_lower_index() -> None:
    assert best(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 2, 4]]
    assert choose(torch.zeros(1, 8), 3, n_group=4, topk_group=2).tolist() == [[0, 1, 2]]
    tied = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])  # four groups of equal score
    assert choose(tied, 2, n_group=4, topk_group=2).tolist() == [[1, 2]]
    everywhere = choose(torch.ones(1000, 64), 6, 1, 1)
    assert (everywhere == torch.arange(6)).all()


def test_group_mask_is_minus_infinity() -> None:
    """With a mask of 0.0 the experts outside the group (0.0) would beat the negative ones inside."""
    biased = torch.tensor([[-0.5, -0.6, -0.9, -1.0]])
    assert choose(biased, 2, n_group=2, topk_group=1).tolist() == [[0, 1]]


def test_scores_are_fp32_whatever_the_input() -> None:
    x_TH, weight_EH = torch.randn(50, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    logits = router_logits(x_TH, weight_EH)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x_TH.double() @ weight_EH.double().T, rtol=1e-5, atol=1e-5, check_dtype=False)
    rounded = (x_TH @ weight_EH.T).float()
    assert (rounded - logits).abs().max() > 1e-3  # what a bf16 projection would have lost


def config(**overrides: object) -> MoEGPTConfig:
    small = {"hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MoEGPTConfig.preset("tiny", **{**small, **overrides})


def initialised(c: MoEGPTConfig) -> MoE:
    moe = MoE(c).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.gate.e_score_correction_bias.copy_(torch.randn(c.n_routed_experts) * 0.3)
    return moe


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
    x_TH, indices_TK = torch.randn(30, 8, dtype=torch.float64), torch.randint(0, 5, (30, 3))
    rows_RH, order_R, place_R = dispatch(x_TH, indices_TK)
    experts = indices_TK.flatten()[order_R]
    assert (experts.diff() >= 0).all()
    weights_TK = torch.rand(30, 3, dtype=torch.float64)
    torch.testing.assert_close(combine(rows_RH, order_R, place_R, weights_TK), x_TH * weights_TK.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(32, 24), (32, 20), (30, 24)])  # the last two are not aligned to 16 bytes in bf16
def test_grouped_product_equals_one_expert_at_a_time(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    counts = torch.tensor([5, 0, 17, 0, 0, 1, 9, 0])
    x = torch.randn(32, sizes[0], dtype=dtype, requires_grad=True)
    weight = torch.randn(8, sizes[1], sizes[0], dtype=dtype, requires_grad=True)
    out, expert = grouped_linear(x, weight, counts), torch.repeat_interleave(torch.arange(8), counts)
    expected = torch.einsum("ra,rba->rb", x.double(), weight.double()[expert])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    dout = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, [x, weight], dout)]
    theirs = [expected, *torch.autograd.grad(expected, [x, weight], dout.double())]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < tolerance
    assert not ours[2][counts == 0].any() and ours[2].isfinite().all()


def test_count() -> None:
    indices = torch.randint(0, 6, (100, 3))
    assert count(indices, 8).tolist() == torch.bincount(indices.flatten(), minlength=8).tolist()


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


def test_load_is_counted_in_training_only() -> None:
    moe = initialised(config())
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    moe.eval()
    moe(x)
    assert int(moe.gate.load_E.sum()) == 0
    moe.train()
    moe(x)
    moe(x)  # two micro-batches
    assert int(moe.gate.load_E.sum()) == 2 * 18 * 2
    logits = router_logits(x.flatten(0, 1), moe.gate.weight)
    assert float(moe.gate.logit_square_sum) == pytest.approx(2 * float(logits.square().sum()), rel=1e-6)
    assert "load_E" not in str(moe.state_dict().keys())


def test_tape_replays_and_does_not_count_again() -> None:
    moe = initialised(config())
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    tape = RoutingTape()
    with tape:
        first = moe(x)
    counted = moe.gate.load_E.clone()
    # Between forward and recomputation everything that decides the choice changes.
    moe.gate.e_score_correction_bias.neg_()
    with tape:
        again = moe(x)
    assert torch.equal(first, again)
    assert torch.equal(moe.gate.load_E, counted)
    with RoutingTape():
        fresh = moe(x)
    assert not torch.equal(first, fresh)
    assert RoutingTape.current() is None


def test_tape_is_ready_again_after_an_early_stop() -> None:
    """torch's checkpoint leaves the recomputation by an exception as soon as it has what it needs."""
    moe = initialised(config())
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    tape = RoutingTape()
    with tape:
        first = moe(x)
    with pytest.raises(RuntimeError, match="stop"), tape:
        moe(x)
        raise RuntimeError("stop")
    assert RoutingTape.current() is None
    with tape:
        assert torch.equal(moe(x), first)


def test_a_tape_keeps_several_routers_in_order() -> None:
    layers = [initialised(config()) for _ in range(2)]
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    tape = RoutingTape()
    for attempt in range(2):
        with tape:
            outs = [layer(x) for layer in layers]
        if attempt == 0:
            firsts = outs
    assert len(tape.choices) == 2
    assert all(torch.equal(a, b) for a, b in zip(firsts, outs, strict=True))


def test_router_without_a_projection_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Router(config()).projection()


def test_a_bf16_module_keeps_its_bias_fp32() -> None:
    """`.bfloat16()` on the plain model, outside any engine."""
    moe = MoE(config())
    moe.gate.e_score_correction_bias.fill_(1.001)
    moe.bfloat16()
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert moe.gate.logit_square_sum.dtype == torch.float32
    assert torch.equal(moe.gate.e_score_correction_bias, torch.full((8,), 1.001))
    assert moe.gate.weight.dtype == torch.bfloat16
    moe.to("meta")
    assert moe.gate.e_score_correction_bias.is_meta


def test_rule_holds_for_every_order_of_four_scores() -> None:
    """All 24 orders, two groups: the chosen pair lies in the group with the larger sum."""
    for order in itertools.permutations([-1.0, -0.25, 0.5, 2.0]):
        weights, indices = route(torch.tensor([order]), torch.zeros(4), top_k=2, n_group=2, topk_group=1)
        theirs = reference.route_token(list(order), [0.0] * 4, 2, 2, 1, "sigmoid", True, 1.0)
        assert indices[0].tolist() == list(theirs)
        assert float(weights.sum()) == pytest.approx(1.0)
