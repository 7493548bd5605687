"""Quantile balancing against exact quantiles in float64, and what it does to experts and groups that are far from even."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.balance import LoadBalancer
from model.choice import group_limited_topk
from model.config import MoEGPTConfig
from model.quantile import BINS, add_to_histogram, bias_lift, histogram_quantile, quantile_step, reach
from model.replay import RouterReplay
from model.router import Gate, router_logits

#: (experts, chosen, groups, chosen groups); one chooses all groups, the last one all experts of its chosen group
ROUTINGS = [(8, 2, 1, 1), (8, 2, 4, 2), (8, 2, 2, 1), (8, 3, 2, 2), (12, 3, 3, 2), (64, 6, 8, 3), (4, 2, 2, 1)]


def scores_and_bias(experts: int, groups: int, tokens: int = 3000, function: str = "sigmoid") -> tuple[Tensor, Tensor]:
    """Scores of tokens that prefer some experts and, as much, some groups; biases of both signs."""
    torch.manual_seed(experts + groups)
    liked = torch.randn(experts) + torch.randn(groups).repeat_interleave(experts // groups) * (groups > 1)
    logits = torch.randn(tokens, 16, dtype=torch.float64) @ torch.randn(16, experts, dtype=torch.float64) * 0.3 + liked
    scores = logits.sigmoid() if function == "sigmoid" else logits.softmax(dim=-1)
    return scores, torch.randn(experts, dtype=torch.float64) * 0.2


def histogram(lift: Tensor, bias: Tensor) -> Tensor:
    counts = torch.zeros(len(bias), BINS, dtype=torch.int64)
    add_to_histogram(counts, lift, bias)
    return counts


@pytest.mark.parametrize(("experts", "k", "groups", "chosen_groups"), ROUTINGS)
def test_a_lift_below_zero_is_a_choice(experts: int, k: int, groups: int, chosen_groups: int) -> None:
    """So the share of tokens with a lift below 0 is an expert's load, and a bias without lift an even one."""
    scores, bias = scores_and_bias(experts, groups)
    lift = bias_lift(scores, bias, top_k=k, n_group=groups, topk_group=chosen_groups)
    indices = group_limited_topk(scores + bias, k, groups, chosen_groups)
    chosen = torch.zeros_like(lift, dtype=torch.bool).scatter_(1, indices, True)
    assert torch.equal(lift < 0, chosen)
    assert lift.abs().max() <= float(reach(bias))


def test_without_groups_it_is_the_published_cutoff() -> None:
    scores, bias = scores_and_bias(8, 1)
    cutoff = (scores + bias).sort(dim=1, descending=True).values[:, 2:3]  # the (k + 1)-th of k = 2
    torch.testing.assert_close(bias + bias_lift(scores, bias, top_k=2), cutoff - scores, rtol=0, atol=1e-14)


def test_the_lift_of_a_group_is_what_keeps_it_in() -> None:
    """By routing anew, where all experts of chosen groups are chosen: moved by its lift a group is level with the best left out."""
    scores, bias = scores_and_bias(8, 4, tokens=200)
    lift = bias_lift(scores, bias, top_k=4, n_group=4, topk_group=2)
    seen = 0
    for group in range(4):
        members = slice(2 * group, 2 * group + 2)
        assert torch.equal(lift[:, 2 * group], lift[:, 2 * group + 1])
        was_in = (group_limited_topk(scores + bias, 4, 4, 2) // 2 == group).any(dim=1)
        for more in (1e-9, -1e-9):
            moved = scores + bias
            moved[:, members] += lift[:, members] + more
            is_in = (group_limited_topk(moved, 4, 4, 2) // 2 == group).any(dim=1)
            assert (is_in[was_in] == (more > 0)).all()
        group_scores = (scores + bias + lift).view(200, 4, 2).sum(dim=2)
        best_left_out = (scores + bias).view(200, 4, 2).sum(dim=2).sort(dim=1, descending=True).values[:, 2]
        torch.testing.assert_close(group_scores[:, group], best_left_out, rtol=0, atol=1e-12)
        seen += int(was_in.sum())
    assert seen == 2 * 200


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("experts", "k", "groups", "chosen_groups"), ROUTINGS)
def test_the_histogram_finds_the_exact_quantile(experts: int, k: int, groups: int, chosen_groups: int, function: str) -> None:
    scores, bias = scores_and_bias(experts, groups, tokens=20_000, function=function)
    lift = bias_lift(scores, bias, top_k=k, n_group=groups, topk_group=chosen_groups)
    exact = torch.quantile(lift, k / experts, dim=0)
    found = histogram_quantile(histogram(lift, bias), bias, k / experts)
    root = (exact / reach(bias)).abs().pow(1 / 3)
    bin_width = reach(bias) * ((root + 2 / BINS) ** 3 - root**3)
    assert exact.abs().max() > 0.01  # there was something to find
    assert ((found - exact).abs() <= bin_width).all(), (found - exact, bin_width)


def test_tokens_lie_evenly_within_their_bin() -> None:
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0, -1] = 4
    lower = (1 - 2 / BINS) ** 3
    for share in (0.25, 0.5, 1.0):
        found = histogram_quantile(counts, torch.zeros(1, dtype=torch.float64), share)
        assert float(found) == pytest.approx(lower + share * (1 - lower), abs=1e-12)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_does_not_end_the_run(what: float) -> None:
    """It is the loss's to say so, and the trainer's to skip the step."""
    (gate,) = gates(1)
    x = torch.randn(10, 32)
    x[3] = what
    gate(x)
    assert int(gate.lift_EN.sum()) == 10 * 8
    gate.forget()
    gate(x[:3])
    assert int(gate.lift_EN.sum()) == 3 * 8
    LoadBalancer([gate], 0.0, rule="quantile").step()
    assert gate.e_score_correction_bias.isfinite().all()


def test_the_step_is_zero_mean_and_an_average_goes_half_way() -> None:
    scores, bias = scores_and_bias(8, 4)
    bias -= bias.mean()
    counts = histogram(bias_lift(scores, bias, top_k=2, n_group=4, topk_group=2), bias)
    whole, half = quantile_step(bias, counts, 0.25), quantile_step(bias, counts, 0.25, average=0.5)
    assert abs(float(whole.mean())) < 1e-15
    torch.testing.assert_close(half, (whole + bias) / 2)
    assert torch.equal(histogram_quantile(torch.zeros_like(counts), bias, 0.25), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("experts", "k", "groups", "chosen_groups"), ROUTINGS)
def test_experts_and_groups_come_out_even(experts: int, k: int, groups: int, chosen_groups: int, function: str) -> None:
    scores, _ = scores_and_bias(experts, groups, tokens=4096, function=function)
    bias, load = torch.zeros(experts, dtype=torch.float64), []
    for _ in range(60):
        indices = group_limited_topk(scores + bias, k, groups, chosen_groups)
        load.append(torch.bincount(indices.flatten(), minlength=experts) * experts / indices.numel())
        lift = bias_lift(scores, bias, top_k=k, n_group=groups, topk_group=chosen_groups)
        bias = quantile_step(bias, histogram(lift, bias), k / experts)
    assert load[0].max() > 1.4
    assert load[-1].max() < 1.06, load[-1]
    assert load[-1].view(groups, -1).mean(dim=1).max() < 1.04


def gates(count: int, **settings: object) -> list[Gate]:
    torch.manual_seed(1)
    config = MoEGPTConfig.preset("tiny", hidden_size=32, num_attention_heads=2, router_balance="quantile", **settings)
    made = [Gate(config) for _ in range(count)]
    for gate in made:
        torch.nn.init.normal_(gate.weight, std=0.5)
        gate.e_score_correction_bias.copy_(torch.randn(8) * 0.2)
    return made


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_a_gate_counts_the_lifts_of_its_own_scores(function: str) -> None:
    (gate,) = gates(1, scoring_func=function)
    x, bias = torch.randn(50, 32), gate.e_score_correction_bias
    gate(x)
    logits = router_logits(x, gate.weight)
    scores = logits.sigmoid() if function == "sigmoid" else logits.softmax(dim=-1)
    lift = bias_lift(scores, bias, top_k=2, n_group=4, topk_group=2)
    assert torch.equal(gate.lift_EN, histogram(lift, bias))


def test_every_token_of_a_step_counts_once() -> None:
    """Over micro-batches, not in evaluation, not in recomputation, not in a skipped step, over ranks by one exact sum."""
    whole, parts, other = gates(3), gates(3), gates(3)
    x = torch.randn(300, 32)
    for gate, split, remote in zip(whole, parts, other, strict=True):
        gate(x)
        remote(x)
        remote.forget()  # a skipped step
        assert int(remote.lift_EN.sum()) == 0
        remote(x[200:])
        split.eval()(x)  # an evaluation
        split.train()
        for rows in (x[:80], x[80:200]):
            replay = RouterReplay()
            for _ in range(2):  # forward and recomputation
                with replay:
                    split(rows)
        assert int(split.lift_EN.sum()) == 200 * 8
    sums = []

    def all_reduce(tensor: Tensor) -> None:
        sums.append(tensor.shape)
        load, squares = torch.stack([r.load_E for r in other]), torch.zeros(3, 1, dtype=torch.int64)
        tensor += torch.cat([load, squares, torch.stack([r.lift_EN.flatten() for r in other])], dim=1)

    LoadBalancer(whole, 0.01, rule="quantile").step()
    health = LoadBalancer(parts, 0.01, all_reduce, rule="quantile").step()
    assert len(sums) == 1 and len(health["load_max_over_mean"]) == 3
    for gate, split in zip(whole, parts, strict=True):
        assert torch.equal(gate.e_score_correction_bias, split.e_score_correction_bias)
        assert gate.e_score_correction_bias.abs().max() > 0.05
        assert int(gate.lift_EN.sum()) == 0 and "lift" not in str(gate.state_dict().keys())


def test_a_skewed_load_is_even_after_a_few_steps() -> None:
    """With gates as they train, in fp32, on new tokens each time; the sign rule needs a hundred steps (test_balance.py)."""
    (gate,) = gates(1)
    with torch.no_grad():
        gate.weight[2:4] += 0.2
        gate.e_score_correction_bias.zero_()
    balancer, worst = LoadBalancer([gate], 0.0, rule="quantile"), []
    for _ in range(25):
        gate(torch.randn(4096, 32) + 0.5)
        worst.append(balancer.step()["load_max_over_mean"][0])
    assert worst[0] > 1.8 and max(worst[-10:]) < 1.15, worst


@pytest.mark.parametrize(("rule", "apart"), [("sign", 0.02), ("proportional", 0.01 * 7 / 1.375)])
def test_the_rate_can_decay(rule: str, apart: float) -> None:
    config = MoEGPTConfig.preset("tiny", hidden_size=32, router_balance=rule, router_bias_rate=0.01, router_bias_decay=0.75)
    steps = []
    for progress in (0.0, 0.5, 1.0, 1.5):  # the last one past the run's end
        gate = Gate(config)
        torch.nn.init.normal_(gate.weight)
        gate.load_E.copy_(torch.tensor([7, 0, 0, 0, 1, 1, 1, 1]))
        LoadBalancer.of(config, [gate]).step(progress=progress)
        steps.append(float(gate.e_score_correction_bias[1] - gate.e_score_correction_bias[0]))
    assert steps == pytest.approx([apart, apart * 0.625, apart * 0.25, apart * 0.25])


def test_a_score_of_one_beside_a_score_of_zero_is_its_own_experts() -> None:
    """In fp32 a router that is sure gives exactly these; the largest lift there can be must not count as the next expert's."""
    scores = 1 - torch.eye(3)
    lift = bias_lift(scores, torch.zeros(3), top_k=1)
    assert float(lift.max()) == float(reach(torch.zeros(3))) == 1
    counts = histogram(lift, torch.zeros(3))
    assert counts.sum(dim=1).tolist() == [3, 3, 3] and counts[:, -1].tolist() == [1, 1, 1]


def test_the_balancer_averages_as_the_configuration_says() -> None:
    """A part `average` of the bias stays: from the same counts, a quarter of the way that the bias goes without one."""
    found = []
    for average in (0.0, 0.75):
        (gate,) = gates(1, router_bias_average=average)
        gate.e_score_correction_bias.sub_(gate.e_score_correction_bias.mean())
        before = gate.e_score_correction_bias.clone()
        gate(torch.linspace(-1, 1, 200).sin().outer(torch.arange(32.0).cos()))
        LoadBalancer.of(MoEGPTConfig.preset("tiny", router_balance="quantile", router_bias_average=average), [gate]).step()
        found.append(gate.e_score_correction_bias - before)
    assert found[0].abs().max() > 0.05
    torch.testing.assert_close(found[1], found[0] / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_quantile_is_the_share_that_a_token_chooses(top_k: int) -> None:
    """Of eight experts so many, whatever the number of groups (two are chosen)."""
    (gate,) = gates(1, num_experts_per_tok=top_k)
    gate(torch.randn(200, 32))
    expected = quantile_step(gate.e_score_correction_bias.clone(), gate.lift_EN.clone(), top_k / 8)
    LoadBalancer([gate], 0.0, rule="quantile").step()
    assert torch.equal(gate.e_score_correction_bias, expected.float())


def test_no_balancing_leaves_the_bias() -> None:
    config = MoEGPTConfig.preset("tiny", hidden_size=32, router_balance="none")
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight)
    gate(torch.randn(50, 32))
    health = LoadBalancer.of(config, [gate]).step()
    assert not gate.e_score_correction_bias.any() and health["load_max_over_mean"][0] > 1


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="router_balance must be one of sign, proportional, quantile, none, got 'auxiliary'"):
        MoEGPTConfig.preset("tiny", router_balance="auxiliary")
    with pytest.raises(ValueError, match="router_bias_average must be at least 0 and below 1"):
        MoEGPTConfig.preset("tiny", router_bias_average=1.0)
    with pytest.raises(ValueError, match="router_balance 'quantile'"):
        LoadBalancer([Gate(MoEGPTConfig.preset("tiny"))], 0.01, rule="quantile")
