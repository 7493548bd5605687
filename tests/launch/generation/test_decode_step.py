"""A new token in few calls: the whole text's logits without a cache, and the usual way wherever something is about a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.generation import decode_step
from launch.generation.decode_step import DecodeStep, can_step
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.cache import GrowingCache

FIELDS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 0.05,
}


def hard_model(**fields: Any) -> MoEGPTForCausalLM:
    """Sinks, norms and router bias that are not those of a new model."""
    torch.manual_seed(6)
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **FIELDS, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("sinks"):
                parameter.add_(torch.randn_like(parameter))
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.2)
    return model


@torch.no_grad()
def logits_of(step: Any, model: MoEGPTForCausalLM, ids_BS: Tensor, mask_BS: Tensor, prompt: int) -> Tensor:
    """`[B, S - prompt, V]`, token by token after a cached prompt."""
    cache, positions_BS = GrowingCache(), (mask_BS.cumsum(-1) - 1).clamp_min(0)
    model(ids_BS[:, :prompt], attention_mask=mask_BS[:, :prompt], position_ids=positions_BS[:, :prompt], past_key_values=cache)
    found = []
    for i in range(prompt, ids_BS.shape[1]):
        found.append(step(ids_BS[:, i], cache, mask_BS[:, : i + 1], positions_BS[:, i : i + 1]))
    return torch.stack(found, dim=1)


def by_modules(model: MoEGPTForCausalLM) -> Callable[..., Tensor]:
    def step(tokens_B: Tensor, cache: GrowingCache, mask: Tensor, positions: Tensor) -> Tensor:
        out = model(tokens_B[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
        return out.logits[:, 0]  # type: ignore[no-any-return]

    return step


@pytest.mark.parametrize("joined_bytes", [0, 1 << 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 3])  # experts one by one, and sorted rows
@pytest.mark.parametrize(
    "fields", [{}, {"attention_sinks": False, "qk_norm": False, "scoring_func": "softmax"}], ids=["all", "plain"]
)
def test_logits_are_those_of_the_whole_text(
    fields: dict[str, Any], batch: int, padded: bool, joined_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "JOINED_BYTES", joined_bytes)
    model = hard_model(**fields).double()
    ids_BS = torch.randint(0, 97, (batch, 14))
    mask_BS = torch.ones_like(ids_BS)
    if padded:
        mask_BS[0, :5] = 0
    with torch.no_grad():
        assert can_step(model)
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
        whole = model(ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False).logits[:, 9:]
        step = DecodeStep(model)
    assert len(step.layers[0].qkv) == (3 if joined_bytes == 0 else 1)
    torch.testing.assert_close(logits_of(step, model, ids_BS, mask_BS, 9), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("batch", [1, 8])
def test_logits_are_those_of_the_modules(batch: int, dtype: torch.dtype, limit: float) -> None:
    """Rounded at the same places: nearer to each other than a bf16 logit is to its float64."""
    model = hard_model().to(dtype)
    ids_BS = torch.randint(0, 97, (batch, 14))
    with torch.no_grad():
        step = DecodeStep(model)
    one, other = (logits_of(way, model, ids_BS, torch.ones_like(ids_BS), 9).double() for way in (step, by_modules(model)))
    assert float((one - other).norm() / other.norm()) < limit


def test_positions_that_nobody_gives_follow_the_cache() -> None:
    model, ids_BS = hard_model().double(), torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        step = DecodeStep(model)
        whole = model(ids_BS, use_cache=False).logits[:, 9:]
    found = logits_of(lambda tokens, cache, *_: step(tokens, cache), model, ids_BS, torch.ones_like(ids_BS), 9)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_q_and_k_are_rounded_where_the_modules_round() -> None:
    """Nearly all to the bit: no product is between, which another number of rows might round otherwise."""
    model = hard_model().bfloat16()
    attention, layer = model.model.layers[0].self_attn, DecodeStep(model).layers[0]
    q, k = torch.randn(3, 1, 4, 16).bfloat16() * 3, torch.randn(3, 1, 2, 16).bfloat16() * 3
    cos, sin = model.model.rotary(torch.tensor([[7], [0], [300]]), 0, 1, q.device)
    with torch.no_grad():
        expected = torch.cat(attention._turned(q, k, (cos, sin)), dim=2)
        found = layer._turned(torch.cat((q, k), dim=2), (cos.unsqueeze(-2), sin.unsqueeze(-2)))
    assert float((found != expected).double().mean()) < 0.01


def test_the_correction_bias_stays_fp32() -> None:
    """All scores alike, so that a bias decides whose last digits bf16 lacks."""
    model = hard_model().bfloat16()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.e_score_correction_bias.copy_(1 + torch.arange(8) / 2048)
        ids_BS, step = torch.randint(0, 97, (2, 12)), DecodeStep(model)
    one, other = (logits_of(way, model, ids_BS, torch.ones_like(ids_BS), 9).double() for way in (step, by_modules(model)))
    assert float((one - other).norm() / other.norm()) < 0.02


class Adapted(nn.Linear):
    """As an adapter replaces a layer."""


def watch(module: nn.Module) -> None:
    module.register_forward_hook(lambda *given: None)


def replace_query(model: MoEGPTForCausalLM) -> None:
    model.model.layers[1].self_attn.q_proj = Adapted(64, 64, bias=False)


def ask_for_attentions(model: MoEGPTForCausalLM) -> None:
    """A configuration takes the wish beside `eager` only; the implementation may change afterwards."""
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    model.set_attn_implementation("sdpa")


def shard(model: MoEGPTForCausalLM) -> None:
    """As ZeRO 3 leaves a weight between its uses."""
    model.model.layers[0].self_attn.o_proj.weight.data = torch.empty(0)


CHANGES: dict[str, Callable[[MoEGPTForCausalLM], object]] = {
    "training": lambda model: model.train(),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "hidden states": lambda model: setattr(model.config, "output_hidden_states", True),
    "attentions": ask_for_attentions,
    "hook": lambda model: watch(model.model.layers[0].mlp.gate),
    "pre-hook": lambda model: model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda *given: None),
    "own forward": lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
    "adapter": replace_query,
    "sharded": shard,
    "meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_about_a_module_keeps_the_usual_way(name: str) -> None:
    model = hard_model()
    with torch.no_grad():
        assert can_step(model)
        CHANGES[name](model)
        assert not can_step(model)


def test_gradients_keep_the_usual_way() -> None:
    assert not can_step(hard_model())
