"""Recomputation changes nothing: bit-equal losses and gradients, loads counted once, ties routed the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import checkpoint_layers
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import MoEGPTConfig, MoEGPTForCausalLM


def keep_products(_context: Any, operation: Any, *_args: Any, **_keywords: Any) -> CheckpointPolicy:
    kept = "mm" in str(operation) or "attention" in str(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


FUNCTIONS: dict[str, dict[str, Any]] = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(keep_products),
    },
}


def build(**overrides: object) -> MoEGPTForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 40, "num_hidden_layers": 3}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**fields, **overrides})).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(8) * 0.01)
    return model


def run(model: MoEGPTForCausalLM) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (4, 50))
    positions = torch.cat((torch.arange(20), torch.arange(30))).expand(4, -1)
    loss = model(ids, labels=ids, position_ids=positions).loss
    loss.backward()
    loads = [layer.mlp.gate.load_E.tolist() for layer in model.model.layers]
    return loss.detach(), [p.grad for p in model.parameters()], loads


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bit_equal(kind: str, attention: str, dropout: float) -> None:
    plain = run(build(attn_implementation=attention, expert_dropout=dropout))
    model = build(attn_implementation=attention, expert_dropout=dropout)
    checkpoint_layers(model, **FUNCTIONS[kind])
    loss, gradients, loads = run(model)
    assert torch.equal(loss, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))
    assert loads == plain[2]
    assert all(sum(load) == 4 * 50 * 2 for load in loads)


def test_forced_ties() -> None:
    """All router scores equal: every token is a tie."""

    def tied() -> MoEGPTForCausalLM:
        model = build()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.zero_()
                layer.mlp.gate.e_score_correction_bias.zero_()
        return model

    plain, model = run(tied()), tied()
    checkpoint_layers(model, use_reentrant=False)
    loss, gradients, loads = run(model)
    assert loads[0] == [200, 200, 0, 0, 0, 0, 0, 0]  # the lowest indices
    assert torch.equal(loss, plain[0]) and loads == plain[2]
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_that_sees_other_scores_still_routes_the_same(use_reentrant: bool) -> None:
    """The bias flips between forward and backward, as a near-tie's rounding might: the first choice holds."""

    def flip_before_recomputing(model: MoEGPTForCausalLM) -> Callable[..., torch.Tensor]:
        runs: dict[int, int] = {}

        def checkpointed(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
            def body(*inner: Any) -> torch.Tensor:
                runs[id(function)] = runs.get(id(function), 0) + 1
                if runs[id(function)] == 2:
                    # a part of a bound method, and since transformers 5.23 of the block's type
                    block: Any = function.args[0] if function.args else function.func.__self__  # type: ignore[attr-defined]
                    block.mlp.gate.e_score_correction_bias.neg_()
                return function(*inner)

            return checkpoint(body, *args, use_reentrant=use_reentrant)

        model.recomputations = runs  # type: ignore[assignment]
        return checkpointed

    plain, model = run(build()), build()
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=flip_before_recomputing(model))
    _, gradients, loads = run(model)
    assert list(model.recomputations.values()) == [2, 2, 2]  # it was recomputed, and flipped
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))
    assert loads == plain[2]
