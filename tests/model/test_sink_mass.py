"""The sinks' share of the attention, against the probabilities of the explicit softmax."""

from __future__ import annotations

import pytest
import torch

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.attention import attention_and_weights
from model.sinks import watching_sink_mass


@pytest.mark.parametrize("packed", [False, True])
def test_the_share_is_what_the_probabilities_lack(packed: bool) -> None:
    torch.manual_seed(0)
    positions = torch.cat((torch.arange(13), torch.arange(35))).expand(2, -1) if packed else None
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=2, vocab_size=64)
    config._attn_implementation = "flash"
    model = MoEGPTForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(0, 3)
    expected: list[torch.Tensor] = []

    def with_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, mask: object) -> torch.Tensor:
        out, probabilities = attention_and_weights(q, k, v, sinks, mask)  # type: ignore[arg-type]
        expected.append((1 - probabilities.double().sum(dim=-1)).mean(dim=1).flatten())  # of each token, over its heads
        return out

    ids, found = torch.randint(0, 64, (2, 48)), list[torch.Tensor]()
    with torch.no_grad(), watching_sink_mass(found.append):
        model(ids, position_ids=positions)
    from model import attention

    flash = attention.ATTENTION["flash"]
    attention.ATTENTION["flash"] = with_eager  # type: ignore[assignment]
    try:
        with torch.no_grad():
            model(ids, position_ids=positions)
    finally:
        attention.ATTENTION["flash"] = flash
    assert len(found) == len(expected) == 2 and min(float(mass_T.mean()) for mass_T in expected) > 0.05
    torch.testing.assert_close(torch.stack(found), torch.stack(expected).float(), atol=1e-5, rtol=1e-5)


def test_nobody_is_told_afterwards() -> None:
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=1, vocab_size=64)
    config._attn_implementation = "flash"
    model, found = MoEGPTForCausalLM(config), list[torch.Tensor]()
    with torch.no_grad(), watching_sink_mass(found.append):
        model(torch.zeros(1, 8, dtype=torch.long))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
    assert len(found) == 1


def test_who_watched_before_is_told_again() -> None:
    """Also after a pass within that failed."""
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=1, vocab_size=64)
    config._attn_implementation = "flash"
    model, ids = MoEGPTForCausalLM(config), torch.zeros(1, 8, dtype=torch.long)
    outer, inner = list[torch.Tensor](), list[torch.Tensor]()
    with torch.no_grad(), watching_sink_mass(outer.append):
        with pytest.raises(RuntimeError, match="stop"), watching_sink_mass(inner.append):
            model(ids)
            raise RuntimeError("stop")
        model(ids)
    assert len(inner) == len(outer) == 1
