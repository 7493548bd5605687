"""The sinks' rule: what it adds to any kernel's output, and why it is not left to autograd."""

import torch

from model.attention import flash_attention
from model.flash import FlashOutput, load_kernel
from model.mask import causal_mask
from model.sinks import add_sink, sink_gradient


def test_the_rule_is_softmax_with_one_more_column() -> None:
    """`(o', lse')` and the sink's gradient against an explicit softmax over [scores, sink], in float64."""
    scores_BNSL, v_BNLD = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 3, torch.randn(2, 3, 7, 4, dtype=torch.float64)
    sinks_N = torch.tensor([-2.0, 0.5, 6.0], dtype=torch.float64, requires_grad=True)
    with_column = torch.cat((scores_BNSL, sinks_N[None, :, None, None].expand(2, 3, 5, 1)), dim=-1)
    expected = (with_column.softmax(dim=-1)[..., :-1] @ v_BNLD).transpose(1, 2)
    plain = (scores_BNSL.softmax(dim=-1) @ v_BNLD).transpose(1, 2)
    out, lse = add_sink(plain, scores_BNSL.logsumexp(dim=-1), sinks_N.detach())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, with_column.logsumexp(dim=-1), rtol=1e-12, atol=1e-14)
    assert (out - plain).abs().max() > 0.1  # the sink matters here
    dout = torch.randn_like(expected)
    (dsinks,) = torch.autograd.grad(expected, sinks_N, dout)
    torch.testing.assert_close(sink_gradient(dout, out.detach(), lse.detach(), sinks_N.detach()), dsinks, rtol=1e-10, atol=1e-12)


def test_bf16_is_rounded_once_and_summed_in_fp32() -> None:
    plain, dout, lse = torch.randn(2, 50, 3, 16).bfloat16(), torch.randn(2, 50, 3, 16).bfloat16(), torch.randn(2, 3, 50)
    sinks_N = torch.tensor([-1.3, 0.1, 1.7])
    out, lse_with = add_sink(plain, lse, sinks_N)
    exact, exact_lse = add_sink(plain.double(), lse.double(), sinks_N.double())
    assert float((out == exact.bfloat16()).double().mean()) > 0.99
    found, expected = (
        sink_gradient(dout, out, lse_with, sinks_N),
        sink_gradient(dout.double(), out.double(), exact_lse, sinks_N.double()),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_rescaling_in_autograd_would_be_wrong() -> None:
    """The trap this module avoids: the same output, wrong dq and dk. Shows that test_attention.py can see it."""
    kernel, mask = load_kernel("cpu"), causal_mask((1, 64), 0, torch.device("cpu"))
    assert kernel is not None

    class NoLseGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            out, lse, _ = kernel.forward(q, k, v, mask, 0.25)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
            *qkv, out, lse = ctx.saved_tensors
            return kernel.backward(dout, *qkv, FlashOutput(out, lse), mask, 0.25)

    q, k, v = (torch.randn(1, 64, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out, lse = NoLseGradient.apply(q, k, v)
    trap = out * torch.sigmoid(lse - sinks[None, :, None]).mT.unsqueeze(-1)
    ours = flash_attention(q, k, v, sinks, causal_mask((1, 64), 0, torch.device("cpu")))
    torch.testing.assert_close(ours, trap, rtol=1e-10, atol=1e-12)
    dout = torch.randn_like(ours)
    right, wrong = torch.autograd.grad(ours, [q, k, v], dout), torch.autograd.grad(trap, [q, k, v], dout)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(right, wrong, strict=True)]
    assert errors[0] > 0.01 and errors[1] > 0.01 and errors[2] < 1e-9
