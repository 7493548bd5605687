"""The bias step against its definition, and what it does to a router that collapses."""

from collections.abc import Callable

import pytest
import torch

from model.balance import LoadBalancer, bias_step, proportional_step, router_health
from model.config import MoEGPTConfig
from model.router import Gate
from tests import reference

Step = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
RULES = {"sign": (bias_step, reference.bias_step), "proportional": (proportional_step, reference.proportional_step)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "load", [[10, 0, 5, 5], [0, 0, 0, 40], [7, 7, 7, 7], [0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 9], [2**40, 1, 1, 2**40 - 1]]
)
def test_step_equals_the_definition(rule: str, load: list[int]) -> None:
    step, definition = RULES[rule]
    bias = torch.linspace(-0.2, 0.3, len(load), dtype=torch.float64)
    ours = step(bias, torch.tensor(load), 0.001)
    torch.testing.assert_close(ours.tolist(), definition(bias.tolist(), load, 0.001), rtol=1e-14, atol=1e-16)
    assert float(ours.sum() - bias.sum()) == pytest.approx(0, abs=1e-15)  # zero-mean


@pytest.mark.parametrize("step", [bias_step, proportional_step])
def test_step_direction_and_silence(step: Step) -> None:
    moved = step(torch.zeros(4), torch.tensor([100, 0, 0, 0]), 0.001)
    assert moved[0] < 0 < moved[1] == moved[2] == moved[3] and moved.dtype == torch.float32
    assert torch.equal(step(torch.ones(4), torch.tensor([3, 3, 3, 3]), 0.001), torch.ones(4))
    assert torch.equal(step(torch.ones(4), torch.zeros(4, dtype=torch.int64), 0.001), torch.ones(4))
    layers = torch.tensor([[100, 0, 0, 0], [3, 3, 3, 3], [9, 2, 0, 1]])
    by_layer = torch.stack([step(torch.ones(4), load, 0.001) for load in layers])
    assert torch.equal(step(torch.ones(3, 4), layers, 0.001), by_layer)


def gates(count: int) -> list[Gate]:
    torch.manual_seed(1)
    config = MoEGPTConfig.preset("tiny", hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    made = [Gate(config) for _ in range(count)]
    for gate in made:
        torch.nn.init.normal_(gate.weight, std=0.5)
    return made


@pytest.mark.parametrize("rule", RULES)
def test_balancer_sums_over_ranks_in_one_reduction_and_updates_in_place(rule: str) -> None:
    layers = gates(3)
    buffers = [gate.e_score_correction_bias for gate in layers]
    x_TH = torch.randn(100, 32)
    for gate in layers:
        gate(x_TH)
    loads = [gate.load_E.clone() for gate in layers]
    squares = [float(gate.logit_square_sum) for gate in layers]
    other_rank = torch.randint(0, 300, (3, 8))
    calls = []

    def all_reduce(tensor: torch.Tensor) -> None:
        assert tensor.dtype == torch.int64
        calls.append(tensor.shape)
        tensor[:, :8] += other_rank
        tensor[:, 8] += 5000 * 1024  # its logits' squares

    balancer = LoadBalancer(layers, rate=0.01, all_reduce=all_reduce, rule=rule)
    metrics = balancer.step()
    assert len(calls) == 1
    assert balancer.load_YE is not None and torch.equal(balancer.load_YE, torch.stack(loads) + other_rank)
    for layer, gate in enumerate(layers):
        total = loads[layer] + other_rank[layer]
        expected = RULES[rule][1]([0.0] * 8, total.tolist(), 0.01)
        torch.testing.assert_close(buffers[layer].tolist(), expected, rtol=1e-6, atol=1e-9)
        assert gate.e_score_correction_bias is buffers[layer]
        assert int(gate.load_E.sum()) == 0 and float(gate.logit_square_sum) == 0
        share = total.double() / total.sum()
        assert metrics["load_max_over_mean"][layer] == pytest.approx(float(share.max() * 8))
        rms = ((squares[layer] + 5000) * 2 / (float(total.sum()) * 8)) ** 0.5
        assert metrics["router_logit_rms"][layer] == pytest.approx(rms, rel=1e-3)


def test_what_is_not_measured_is_balanced_all_the_same() -> None:
    (gate,) = gates(1)
    gate(torch.randn(100, 32))
    assert LoadBalancer([gate], 0.01).step(measure=False) == {} and gate.e_score_correction_bias.any()


def test_it_flattens_a_skewed_load_and_rate_zero_does_not() -> None:
    """Tokens with a common direction send most of the load to few experts; the bias brings it back."""

    def run(rate: float, rule: str = "sign") -> list[float]:
        (gate,) = gates(1)
        with torch.no_grad():
            gate.weight[2] += 0.2  # together with the tokens' common offset this favours experts 2 and 3
            gate.weight[3] += 0.2
        balancer, imbalance = LoadBalancer([gate], rate, rule=rule), []
        for _ in range(150):
            gate(torch.randn(256, 32) + 0.5)
            imbalance.append(balancer.step()["load_max_over_mean"][0])
        return imbalance

    still = run(0.0)
    assert sum(still[-20:]) / 20 > 2.0
    for rule in RULES:
        balanced = run(0.02, rule)
        assert sum(balanced[-20:]) / 20 < 1.5, rule
        assert balanced[0] > 2.0


def test_health_of_even_and_collapsed_loads() -> None:
    load = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    bias = torch.tensor([[0.0, 0, 0, 0], [-0.3, 0.1, 0.1, 0.1]])
    numbers = router_health(load, bias, torch.tensor([160.0, 0.0]), top_k=2)
    assert numbers["load_max_over_mean"] == pytest.approx([1, 4])
    assert numbers["load_entropy"] == pytest.approx([1, 0])
    assert numbers["unused_experts"] == pytest.approx([0, 0.75])
    assert numbers["bias_range"] == pytest.approx([0, 0.4])
    assert numbers["router_logit_rms"] == pytest.approx([2.0, 0])  # 160 over 10 tokens x 4 experts is 4


def test_health_of_no_load_is_a_number() -> None:
    """As of a layer whose router no token of a step has met."""
    numbers = router_health(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(1), top_k=2)
    assert {name: value for name, (value,) in numbers.items()} == {
        "load_max_over_mean": 0, "load_entropy": 0, "unused_experts": 1, "bias_range": 0, "router_logit_rms": 0
    }  # fmt: skip


def test_small_logits_are_measured() -> None:
    """Of a new router: the squares of all logits of a step come to less than one, and travel among integers."""
    (gate,) = gates(1)
    with torch.no_grad():
        gate.weight.mul_(0.005)
    x_TH = torch.randn(100, 32)
    gate(x_TH)
    expected = float((x_TH @ gate.weight.detach().T).square().mean().sqrt())
    assert float(gate.logit_square_sum) < 1
    (rms,) = LoadBalancer([gate], 0.0).step()["router_logit_rms"]
    assert rms == pytest.approx(expected, rel=0.01)


def test_health_of_a_single_expert_is_a_number() -> None:
    """As of the dense model that `launch/benchmark.py learning` compares with."""
    numbers = router_health(torch.tensor([[20]]), torch.zeros(1, 1), torch.tensor([20.0]), top_k=1)
    assert {name: value for name, (value,) in numbers.items()} == {
        "load_max_over_mean": 1, "load_entropy": 0, "unused_experts": 0, "bias_range": 0, "router_logit_rms": 1
    }  # fmt: skip


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="no router"):
        LoadBalancer(torch.nn.Linear(2, 2), 0.001)
