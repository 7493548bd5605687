"""Routing against DeepSeek-V3's rule token by token; what stays fp32; what is counted."""

import itertools

import pytest
import torch
from torch import Tensor

from model.choice import group_limited_topk, stable_topk
from model.config import PRESETS, MoEGPTConfig
from model.moe import MoE
from model.router import Router, route, router_logits, tokens_per_expert
from tests import reference
from tests.model.small_moe import config, initialised

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
    assert stable_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 2, 4]]
    assert group_limited_topk(torch.zeros(1, 8), 3, n_group=4, topk_group=2).tolist() == [[0, 1, 2]]
    tied = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])  # four groups of equal score
    assert group_limited_topk(tied, 2, n_group=4, topk_group=2).tolist() == [[1, 2]]
    everywhere = group_limited_topk(torch.ones(1000, 64), 6, 1, 1)
    assert (everywhere == torch.arange(6)).all()


def test_group_mask_is_minus_infinity() -> None:
    """With a mask of 0.0 the experts outside the group (0.0) would beat the negative ones inside."""
    biased = torch.tensor([[-0.5, -0.6, -0.9, -1.0]])
    assert group_limited_topk(biased, 2, n_group=2, topk_group=1).tolist() == [[0, 1]]


def test_scores_that_are_all_zero_weigh_nothing() -> None:
    """In fp32 a sigmoid of -200 is: a quotient of two would be no number."""
    weights, _ = route(torch.full((3, 8), -200.0), torch.zeros(8), top_k=2)
    assert torch.equal(weights, torch.zeros(3, 2))


def test_scores_are_fp32_whatever_the_input() -> None:
    x_TH, weight_EH = torch.randn(50, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    logits = router_logits(x_TH, weight_EH)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x_TH.double() @ weight_EH.double().T, rtol=1e-5, atol=1e-5, check_dtype=False)
    rounded = (x_TH @ weight_EH.T).float()
    assert (rounded - logits).abs().max() > 1e-3  # what a bf16 projection would have lost


def test_count() -> None:
    indices = torch.randint(0, 6, (100, 3))
    assert tokens_per_expert(indices, 8).tolist() == torch.bincount(indices.flatten(), minlength=8).tolist()


def test_a_gate_routes_by_its_configuration() -> None:
    rule = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 2.5}
    gate = initialised(config(num_experts_per_tok=3, n_group=4, topk_group=2, **rule)).gate
    x_TH = torch.randn(50, 32, dtype=torch.float64)
    bias = gate.e_score_correction_bias.tolist()
    logits = (x_TH @ gate.weight.T).tolist()
    theirs = [reference.route_token(row, bias, 3, 4, 2, "softmax", False, 2.5) for row in logits]
    weights_TK, indices_TK, *_ = gate(x_TH)
    for ours, one in zip(as_lists(weights_TK, indices_TK), theirs, strict=True):
        assert list(ours) == list(one) and list(ours.values()) == pytest.approx(list(one.values()), rel=1e-12)


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
    assert not moe.gate.logit_square_sum.requires_grad, "every micro-batch's graph would stay"
    moe.gate.forget()
    assert not moe.gate.load_E.any() and not moe.gate.logit_square_sum


def test_counters_are_in_no_checkpoint() -> None:
    gate = MoE(config(router_balance="quantile")).gate
    assert gate.lift_EN is not None and list(gate.state_dict()) == ["weight", "e_score_correction_bias"]


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


@pytest.mark.parametrize("chosen_groups", [1, 2])
def test_one_chosen_group_leaves_no_gradient_that_says_which(chosen_groups: int) -> None:
    """Normalised weights of one group's experts do not change when all of its logits do; with two chosen they do."""
    torch.manual_seed(0)
    logits = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    weights, indices = route(
        logits, torch.zeros(8), top_k=2, n_group=4, topk_group=chosen_groups, scoring_func="softmax", norm_topk_prob=True
    )
    (weights * torch.randn(64, 2, dtype=torch.float64)).sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) > 0.1
    across = logits.grad.unflatten(1, (4, 2)).sum(dim=-1).abs().amax(dim=1)
    apart = indices[:, 0] // 2 != indices[:, 1] // 2
    assert float(across[~apart].max()) < 1e-12
    assert bool(apart.any()) == (chosen_groups == 2) and (chosen_groups == 1 or float(across[apart].min()) > 1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_groups_can_be_learned(preset: str) -> None:
    config = MoEGPTConfig.preset(preset)
    assert config.n_group == 1 or config.topk_group > 1


def test_autocast_leaves_the_logits_alone() -> None:
    """`Trainer(bf16=True)` trains under it: in bf16 they would move tokens near a tie."""
    x, weight = torch.randn(20, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ weight.T).dtype == torch.bfloat16
        logits = router_logits(x, weight)
    assert torch.equal(logits, router_logits(x, weight)) and logits.dtype == torch.float32
