"""One token after a cache: attention and experts as the formulas have them in float64, whole models as they are without a cache."""

from __future__ import annotations

import pytest
import torch
from reference import attention_with_sinks, mixture
from torch import Tensor
from transformers import DynamicCache

from model import MoEGPTConfig, MoEGPTForCausalLM, decode
from model.attention import Attention
from model.cache import GrowingCache
from model.mask import AttentionMask, causal_mask
from model.moe import MoE

B, L, N, M, D = 3, 11, 4, 2, 8


def padding(first: list[int]) -> Tensor:
    """`[B, L]`: False before each row's first position."""
    return torch.arange(L)[None] >= torch.tensor(first)[:, None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_of_one_query(sinks: bool, padded: bool) -> None:
    torch.manual_seed(0)
    storage = torch.randn(2, B, M, L + 5, D, dtype=torch.float64)  # as a growing cache holds them: room behind, heads first
    k, v = (x[:, :, :L].transpose(1, 2) for x in storage)
    q, sink = torch.randn(B, 1, N, D, dtype=torch.float64), torch.randn(N, dtype=torch.float64) * 3 if sinks else None
    keep = padding([0, 4, 9]) if padded else torch.ones(B, L, dtype=torch.bool)
    mask = AttentionMask(queries=1, keys=L, device=q.device, padding_BL=keep if padded else None)
    out = decode.attend_one(q, k, v, sink, mask)
    expected = attention_with_sinks(q, k, v, sink, keep[:, None])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_one_query_in_bf16(padded: bool) -> None:
    """As near to float64 as its rounding, of each head: scores, sinks and softmax are fp32."""
    q, k, v = (torch.randn(B, length, heads, D).bfloat16() for length, heads in ((1, N), (300, M), (300, M)))
    sinks, keep = torch.tensor([-2.3, 0.7, 12.3, 20.3]), torch.ones(B, 300, dtype=torch.bool)  # none exact in bf16
    keep[:, 0] = not padded
    mask = AttentionMask(queries=1, keys=300, device=q.device, padding_BL=keep if padded else None)
    expected = attention_with_sinks(*(x.double() for x in (q, k, v, sinks)), keep[:, None])
    out = decode.attend_one(q, k, v, sinks, mask)
    assert out.dtype == torch.bfloat16
    lost_N, size_N = (torch.linalg.vector_norm(x, dim=(0, 1, 3)) for x in (out.double() - expected, expected))
    assert (lost_N < 0.02 * size_N).all(), lost_N / size_N  # a sink of 20.25 would be off by 5 %


def test_one_query_with_gradients_keeps_the_way_of_training() -> None:
    """This one's kernel drops the gradient of its logsumexp, on which the sinks' share depends."""
    attention = Attention(MoEGPTConfig.preset("tiny", attn_implementation="sdpa"), 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, rope = torch.randn(2, 3, attention.config.hidden_size, dtype=torch.float64), (torch.ones(1, 3, 64), torch.zeros(1, 3, 64))
    found = []
    for only in (True, False):  # the last position after a cache, and in the whole
        cache, parts = DynamicCache(), ((0, 2), (2, 3)) if only else ((0, 3),)
        for a, b in parts:
            mask = causal_mask((2, b - a), a, x.device)
            out, _ = attention(x[:, a:b], tuple(table[:, a:b] for table in rope), mask, cache)
        found.append(torch.autograd.grad(out[:, -1].square().sum(), list(attention.parameters())))
    for one, whole in zip(*found, strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)
        assert whole.any()


@pytest.mark.parametrize("tokens", [1, decode.FEW_TOKENS])
def test_experts_of_a_few_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, and against the sorted rows that training takes."""
    torch.manual_seed(1)
    layer = MoE(MoEGPTConfig.preset("tiny", hidden_size=32, moe_intermediate_size=16)).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.gate.e_score_correction_bias.normal_(std=0.2)
    x = torch.randn(tokens, 1, 32, dtype=torch.float64)
    asked: list[Tensor] = []
    taking = decode.few_experts
    monkeypatch.setattr("model.moe.few_experts", lambda *a: (asked.append(a[1]), taking(*a))[1])
    with torch.no_grad():
        out = layer(x, x)
        weights, indices, *_ = layer.gate(x.flatten(0, 1))
        chosen = [dict(zip(row.tolist(), w.tolist(), strict=True)) for row, w in zip(indices, weights, strict=True)]
        routed = mixture(x.flatten(0, 1), chosen, layer.experts.gate_up_proj, layer.experts.down_proj)
        expected = (routed + layer.shared_experts(x.flatten(0, 1)) + x.flatten(0, 1)).view_as(x)
    assert len(asked) == 1 and asked[0].shape == (tokens, 2)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer(x, x), out, rtol=1e-9, atol=1e-12)  # with gradients: the sorted way
    assert len(asked) == 1


@pytest.mark.parametrize(("tokens", "batched"), [(7, 0), (8, 1), (decode.BATCH_TOKENS, 1), (decode.BATCH_TOKENS + 1, 0)])
def test_experts_of_a_batch_in_half_precision(tokens: int, batched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts in one product from two tokens an expert on; as near to float64 as the sorted rows are."""
    torch.manual_seed(1)
    layer = MoE(MoEGPTConfig.preset("tiny", hidden_size=32, moe_intermediate_size=16)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.gate.e_score_correction_bias.normal_(std=0.2)
    layer.bfloat16()
    x = torch.randn(tokens, 1, 32, dtype=torch.bfloat16)
    asked: list[Tensor] = []
    taking = decode.few_experts
    monkeypatch.setattr("model.moe.few_experts", lambda *a: (asked.append(a[1]), taking(*a))[1])
    with torch.no_grad():
        out = layer(x, x).double()
        weights, indices, *_ = layer.gate(x.flatten(0, 1))
        chosen = [dict(zip(row.tolist(), w.tolist(), strict=True)) for row, w in zip(indices, weights, strict=True)]
        routed = mixture(x.flatten(0, 1).double(), chosen, layer.experts.gate_up_proj.double(), layer.experts.down_proj.double())
        expected = (routed + layer.double().shared_experts(x.flatten(0, 1).double()) + x.flatten(0, 1)).view_as(x)
    layer.bfloat16()
    assert len(asked) == batched
    sorted_way = layer(x, x).double().detach()  # as with gradients
    assert float((out - expected).norm() / expected.norm()) < 0.01
    assert float((out - expected).norm()) < 1.5 * float((sorted_way - expected).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implementation", ["sdpa", "flash"])
def test_a_cached_token_is_what_the_whole_text_gives(implementation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    fields = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **fields, attn_implementation=implementation)).to(dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(std=2.0)
    ids, cache = torch.randint(0, 97, (2, 20)), GrowingCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits.double()
        model(ids[:, :15], past_key_values=cache)
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(15, 20)], dim=1).double()
    assert float((steps - whole[:, 15:]).norm() / whole[:, 15:].norm()) < (1e-9 if dtype == torch.float64 else 1e-4)
