"""Every attention at hand against the formula written out: forward, and the gradients of q, k, v and the sinks."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_eager

from model.attention import _sdpa, eager_attention, flash_attention, prepare, sdpa_attention
from model.mask import causal_mask
from tests import reference

Attention = Callable[..., Tensor]
ALL = {"eager": eager_attention, "sdpa": sdpa_attention, "flash": flash_attention}
CPU = torch.device("cpu")


def inputs(batch: int, length: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, length, heads, dim), (batch, length, key_heads, dim), (batch, length, key_heads, dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(out: Tensor, of: list[Tensor], dout: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, of, dout))


def documents(batch: int, length: int, cuts: list[list[int]]) -> Tensor:
    """Position ids [B, S] that restart at each cut of the row."""
    rows = []
    for cut in cuts:
        ends = [0, *cut, length]
        rows.append(torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("heads", "key_heads", "length"),
    [(1, 1, 1), (1, 1, 33), (4, 4, 64), (4, 2, 129), (8, 2, 77), (8, 1, 300), (6, 2, 512)],
)
@pytest.mark.parametrize("sink", [None, -20.0, -1.0, 0.0, 3.0, 20.0])
def test_against_the_formula_in_float64(name: str, heads: int, key_heads: int, length: int, sink: float | None) -> None:
    q, k, v = inputs(2, length, heads, key_heads, 16, torch.float64)
    sinks = None
    if sink is not None:
        sinks = (sink + 0.5 * torch.randn(heads, dtype=torch.float64)).requires_grad_()
    allowed = torch.ones(2, length, length, dtype=torch.bool).tril()
    expected = reference.attention_with_sinks(q, k, v, sinks, allowed)
    mask = causal_mask((2, length), 0, CPU)
    out = ALL[name](q, k, v, sinks, mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    dout, leaves = torch.randn_like(out), [q, k, v, *([sinks] if sinks is not None else [])]
    for ours, theirs in zip(gradients(out, leaves, dout), gradients(expected, leaves, dout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if sink is not None and sink > -10:
        plain = reference.attention_with_sinks(q, k, v, None, allowed)
        assert (out - plain).abs().max() > 1e-3  # the sink matters here


@pytest.mark.parametrize("name", ALL)
def test_the_sinks_alone_can_be_trained(name: str) -> None:
    q, k, v = (x.detach() for x in inputs(2, 20, 4, 2, 16, torch.float64))
    sinks, allowed = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.ones(2, 20, 20, dtype=torch.bool).tril()
    found = [
        torch.autograd.grad(out.square().sum(), sinks)[0]
        for out in (
            ALL[name](q, k, v, sinks, causal_mask((2, 20), 0, CPU)),
            reference.attention_with_sinks(q, k, v, sinks, allowed),
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_bf16_is_as_close_as_its_rounding(name: str) -> None:
    q, k, v = inputs(2, 200, 4, 2, 64, torch.bfloat16)
    sinks = torch.tensor([-2.3, 0.7, 1.3, 20.3]).requires_grad_()  # none exact in bf16
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    allowed = torch.ones(2, 200, 200, dtype=torch.bool).tril()
    expected = reference.attention_with_sinks(*exact, allowed)
    out = ALL[name](q, k, v, sinks, causal_mask((2, 200), 0, CPU))
    assert out.dtype == torch.bfloat16
    lost_N, size_N = (torch.linalg.vector_norm(x, dim=(0, 1, 3)) for x in (out.double() - expected, expected))
    assert (lost_N < 0.01 * size_N).all(), lost_N / size_N  # of each head: what a sink of 20 leaves is small beside the others'
    dout = torch.randn_like(out)
    pairs = [(out, expected)]
    pairs += zip(gradients(out, [q, k, v, sinks], dout), gradients(expected, exact, dout.double()), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        error = (ours.double() - theirs).norm() / theirs.norm()
        # bf16 has 8 bits: 2^-8 is 0.004 on each rounding. sdpa carries the sink's gradient through bf16 scores, and
        # its terms cancel; the flash rule computes it in fp32.
        # torch 2.11's kernel, which gives it the output, is a third worse than 2.13's: 0.014.
        limit = {"sdpa": 0.03, "flash": 0.02}.get(name, 0.01) if index == 4 else 0.01
        assert error < limit, (index, float(error))


@pytest.mark.parametrize("name", ALL)
def test_equals_transformers_gpt_oss(name: str) -> None:
    q, k, v = inputs(2, 90, 8, 2, 64, torch.float32)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 4, torch.nn.Parameter(torch.linspace(-20, 20, 8))
    mask = torch.full((90, 90), -torch.inf).triu(1)[None, None]
    theirs, _ = gpt_oss_eager(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=64**-0.5)
    ours = ALL[name](q, k, v, module.sinks, causal_mask((2, 90), 0, CPU))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    dout, leaves = torch.randn_like(ours), [q, k, v, module.sinks]
    for a, b in zip(gradients(ours, leaves, dout), gradients(theirs, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("with_sinks", [True, False])
def test_documents_against_the_formula(name: str, with_sinks: bool) -> None:
    positions = documents(2, 150, [[1, 40, 41, 149], [75]])
    q, k, v = inputs(2, 150, 4, 2, 16, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    expected = reference.attention_with_sinks(q, k, v, sinks, reference.allowed_pairs(positions))
    mask = causal_mask((2, 150), 0, CPU, position_ids=positions)
    assert mask.seqlens == (1, 39, 1, 108, 1, 75, 75)
    out = ALL[name](q, k, v, sinks, mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    dout, leaves = torch.randn_like(out), [q, k, v, *([sinks] if sinks is not None else [])]
    for ours, theirs in zip(gradients(out, leaves, dout), gradients(expected, leaves, dout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_document_two_never_sees_document_one(name: str, dtype: torch.dtype) -> None:
    """Bit-equal, forward and backward, while document 1 itself does change."""
    positions = documents(1, 300, [[130]])
    mask = causal_mask((1, 300), 0, CPU, position_ids=positions)
    q, k, v = inputs(1, 300, 4, 2, 64, dtype)
    sinks = torch.randn(4)
    other = [x.detach().clone() for x in (q, k, v)]
    for x in other:
        x[:, :130] = torch.randn_like(x[:, :130])
        x.requires_grad_()
    out, changed = ALL[name](q, k, v, sinks, mask), ALL[name](*other, sinks, mask)
    assert torch.equal(out[:, 130:], changed[:, 130:])
    assert not torch.equal(out[:, :130], changed[:, :130])
    dout = torch.randn_like(out)
    for a, b in zip(gradients(out, [q, k, v], dout), gradients(changed, other, dout), strict=True):
        assert torch.equal(a[:, 130:], b[:, 130:])
        assert not torch.equal(a[:, :130], b[:, :130])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_queries_after_a_cache(name: str, with_sinks: bool, queries: int) -> None:
    """The last queries of a longer sequence give what they give in the whole of it."""
    q, k, v = inputs(2, 40, 4, 2, 16, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    allowed = torch.ones(2, 40, 40, dtype=torch.bool).tril()
    expected = reference.attention_with_sinks(q, k, v, sinks, allowed)[:, -queries:]
    out = ALL[name](q[:, -queries:], k, v, sinks, causal_mask((2, queries), 40 - queries, CPU))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_left_padding(name: str) -> None:
    q, k, v = inputs(2, 20, 4, 2, 16, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    out = ALL[name](q, k, v, sinks, causal_mask((2, 20), 0, CPU, attention_mask=mask))
    alone = ALL["eager"](q[:1, 7:], k[:1, 7:], v[:1, 7:], sinks, causal_mask((1, 13), 0, CPU))
    torch.testing.assert_close(out[:1, 7:], alone, rtol=1e-10, atol=1e-12)
    assert out.isfinite().all()  # padded queries see themselves


@pytest.mark.parametrize(
    ("dtype", "masked", "heads"), [(torch.bfloat16, False, 2), (torch.bfloat16, True, 8), (torch.float32, False, 8)]
)
def test_no_scores_are_held_on_a_gpu(dtype: torch.dtype, masked: bool, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's flash kernel takes neither a mask nor fp32, and its memory-efficient one no grouped heads."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **keywords: object) -> Tensor:
        seen.append((k.shape[1], v.shape[1], keywords["enable_gqa"]))
        return real(q, k, v, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with FakeTensorMode(), torch.device("cuda"):
        q, k = (torch.empty(2, 16, n, 64, dtype=dtype) for n in (8, 2))
        allowed = torch.empty(2, 1, 16, 16, dtype=torch.bool) if masked else None
        assert _sdpa(q, k, k, allowed, not masked, 0.1).shape == q.shape
    assert seen == [(heads, heads, heads == 2)]


def test_heads_that_are_repeated_for_a_gpu_are_their_groups_own() -> None:
    """On the CPU, by queries that claim to lie on a GPU."""

    class Claimed(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    q, k, v = (x.detach() for x in inputs(2, 16, 6, 2, 8, torch.float64))
    allowed = torch.ones(2, 16, 16, dtype=torch.bool).tril()
    out = _sdpa(q.as_subclass(Claimed), k, v, allowed[:, None], False, 8**-0.5).as_subclass(Tensor)
    torch.testing.assert_close(out, reference.attention_with_sinks(q, k, v, None, allowed), rtol=1e-10, atol=1e-12)


def test_a_kernel_by_its_name_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("model.attention.load_kernel", asked.append)
    q, k, v = inputs(1, 8, 2, 2, 16, torch.float32)
    mask = causal_mask((1, 8), 0, CPU)
    assert torch.equal(flash_attention(q, k, v, None, mask, "FlashAttention-9"), sdpa_attention(q, k, v, None, mask))
    assert asked == ["FlashAttention-9"]


PACKED = {"position_ids": torch.tensor([[0, 1, 0, 1]])}


@pytest.mark.parametrize(
    ("implementation", "kernel", "given", "made"),
    [
        ("eager", None, {}, True),
        ("sdpa", None, {}, False),
        ("sdpa", None, PACKED, True),
        ("flash", "one", PACKED, False),
        ("flash", "one", {"attention_mask": torch.tensor([[0, 1, 1, 1]])}, True),
        ("flash", None, PACKED, True),
    ],
)
def test_the_masks_tensor_is_made_before_the_layers_that_read_it(
    implementation: str, kernel: str | None, given: dict[str, Tensor], made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.attention.pick_kernel", lambda *_: kernel)
    mask = causal_mask((1, 4), 0, CPU, **given)
    prepare(implementation, torch.empty(1), 16, mask)
    assert ("allowed_B1SL" in vars(mask)) is made


def test_the_kernel_that_is_prepared_is_that_of_autocast_s_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fp32 stream it is another: a compiled region then traced the choice, and packed documents got a mask nobody read."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr("model.attention.pick_kernel", lambda device, dtype, head_dim: asked.append(dtype))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prepare("flash", torch.empty(1), 16, causal_mask((1, 4), 0, CPU))
    assert asked == [torch.bfloat16, torch.float32]
