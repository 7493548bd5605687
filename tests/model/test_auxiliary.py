"""The classical auxiliary loss: as if it had been added to the model's loss, in gradients, whatever scales that."""

from typing import Any

import pytest
import torch
from support import checkpoint_layers

from model.auxiliary import AuxiliaryLoss, balance_loss
from model.config import MoEGPTConfig
from model.router import Gate
from tests.model.test_activation_checkpointing import FUNCTIONS, build, run


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_are_those_of_the_sum(function: str, scale: float) -> None:
    torch.manual_seed(0)
    config = MoEGPTConfig.preset("tiny", hidden_size=32, scoring_func=function, router_aux_loss_coef=0.3)
    gate = Gate(config).double()
    torch.nn.init.normal_(gate.weight, std=0.4)
    x, factor = torch.randn(60, 32, dtype=torch.float64, requires_grad=True), torch.randn(60, 2, dtype=torch.float64)

    weights, indices, *_ = gate(x)
    loss = (weights * factor).sum()
    AuxiliaryLoss.follow(loss)
    ours = torch.autograd.grad(scale * loss, (gate.weight, x))

    logits = x @ gate.weight.T
    scores = logits.sigmoid() if function == "sigmoid" else logits.softmax(dim=1)
    chosen = scores.gather(1, indices)
    loss = (chosen / chosen.sum(dim=1, keepdim=True) * factor).sum()
    fraction = torch.stack([(indices == expert).sum().double() / 60 / 2 * 8 for expert in range(8)])
    mean = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
    auxiliary = 0.3 * sum(f * p for f, p in zip(fraction, mean, strict=True))
    assert fraction.max() > 1.5
    theirs = torch.autograd.grad(scale * (loss + auxiliary), (gate.weight, x))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_there_is_none_of_it_outside_training() -> None:
    """A gradient that is asked for in evaluation is the scores' own, and needs no loss of the model's."""
    x, gradients = torch.randn(60, 32), []
    for coefficient in (0.3, 0.0):
        torch.manual_seed(0)
        gate = Gate(MoEGPTConfig.preset("tiny", hidden_size=32, router_aux_loss_coef=coefficient)).eval()
        torch.nn.init.normal_(gate.weight, std=0.4)
        weights, *_ = gate(x)
        gradients += torch.autograd.grad(weights[:, 0].sum(), gate.weight)
    assert torch.equal(*gradients) and gradients[0].any()


def test_even_routing_costs_one() -> None:
    assert float(balance_loss(torch.full((10, 4), 0.5), torch.tensor([5, 5, 5, 5]))) == pytest.approx(1)
    assert float(balance_loss(torch.eye(4)[[0] * 10], torch.tensor([10, 0, 0, 0]))) == pytest.approx(4)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_through_a_recomputed_model(kind: str) -> None:
    def trained(coefficient: float, kind: str | None = None) -> tuple[Any, list[torch.Tensor]]:
        model = build(router_aux_loss_coef=coefficient, attn_implementation="sdpa")
        if kind:
            checkpoint_layers(model, **FUNCTIONS[kind])
        loss, gradients, _ = run(model)
        return loss, gradients

    without, (loss, plain), (again, recomputed) = trained(0.0), trained(0.1), trained(0.1, kind)
    assert torch.equal(without[0], loss) and torch.equal(again, loss)  # the loss that is logged is the language model's
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, without[1], strict=True))


def test_a_backward_without_the_models_loss_is_refused_after_one_with_it_too() -> None:
    model = build(router_aux_loss_coef=0.1, attn_implementation="sdpa")
    run(model)
    with pytest.raises(RuntimeError, match="a backward without the model's own loss"):
        model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
