"""RMSNorm against its formula: statistics and product in fp32, rounded once. Several projections of one input."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from model import layers
from model.layers import FusedNorm, Project, ResidualLinear, RMSNorm, project
from tests import reference


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_rms_norm_is_rounded_once(dtype: torch.dtype, limit: float) -> None:
    norm = RMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = (torch.randn(200, 48, dtype=torch.float64) * 30).to(dtype)
    exact = reference.rms_norm(x.double(), norm.weight.detach().double(), 1e-5)
    out = norm(x)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= limit * exact.abs() + 1e-12).all()


def test_a_residual_projection_has_no_bias() -> None:
    assert ResidualLinear(3, 4).bias is None


def test_what_accelerate_has_elsewhere_is_called() -> None:
    """Between calls an offloaded layer's weight is on `meta`, and only its own forward fetches it: all was NaN."""
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    assert layers._is_plain(layer, x)
    layer._hf_hook = object()  # type: ignore[assignment]
    assert not layers._is_plain(layer, x)
    assert not layers._is_plain(nn.Linear(4, 4, bias=False, device="meta"), x)


def test_what_is_cast_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By autocast, or by whoever keeps a layer in another precision than its input's."""
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    assert not layers._is_plain(layer, x.bfloat16())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not layers._is_plain(layer, x)


@pytest.mark.parametrize("used", ["both", "stream", "norm"])
@pytest.mark.parametrize("frozen", ["none", "x", "added"])
def test_gradients_of_the_fused_norm(used: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of stream and norm is gone on with; in float64, with kernels written out by autograd."""

    def norm(x: Tensor, added: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        stream = x if added is None else x + added
        return stream, reference.rms_norm(stream, weight_H, eps)

    def norm_backward(dout: Tensor, beside: Tensor | None, stream: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        leaves = [stream.detach().requires_grad_(), weight_H.detach().requires_grad_()]
        with torch.enable_grad():
            dstream, dweight = torch.autograd.grad(reference.rms_norm(*leaves, eps), leaves, dout)
        return dstream if beside is None else dstream + beside, dweight

    given = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)] + [torch.rand(6, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x, name in zip(given, ("x", "added", "weight"), strict=True) if name != frozen]
    douts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    x, added, weight_H = given
    monkeypatch.setattr(layers, "ops", SimpleNamespace(norm=norm, norm_backward=norm_backward))
    found = []
    for way in (lambda: FusedNorm.apply(x, added, weight_H, 1e-5), lambda: norm(x, added, weight_H, 1e-5)):
        stream, out = way()
        kept = {"both": (stream, out), "stream": (stream,), "norm": (out,)}[used]
        found.append(torch.autograd.grad(kept, leaves, douts[: len(kept)], allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
def test_projections_of_one_input_are_three_layers(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients; in float64 on a CPU, made to go the way of a GPU."""
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    three = [nn.Linear(6, width, bias=False, dtype=torch.float64) for width in (8, 3, 3)]
    for index in frozen:
        three[index].weight.requires_grad_(False)
    leaves = [x, *(layer.weight for layer in three if layer.weight.requires_grad)]
    expected = [layer(x) for layer in three]
    douts = [torch.randn_like(out) for out in expected]
    assert type(project(x, *three)[0].grad_fn) is type(expected[0].grad_fn)
    monkeypatch.setattr(layers, "usable", lambda _: True)
    found = project(x, *three)
    assert all(isinstance(out.grad_fn, Project._backward_cls) for out in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pairs = zip(torch.autograd.grad(found, leaves, douts), torch.autograd.grad(expected, leaves, douts), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_a_layer_that_does_more_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "usable", lambda _: True)
    x = torch.randn(4, 6, requires_grad=True)

    def joined(*ours: nn.Linear) -> bool:
        return isinstance(project(x, *ours)[0].grad_fn, Project._backward_cls)

    plain = nn.Linear(6, 8, bias=False)
    for way in ("forward_pre", "full_backward", "full_backward_pre"):
        watched = nn.Linear(6, 8, bias=False)
        getattr(watched, f"register_{way}_hook")(lambda *given: None)
        assert not joined(plain, watched), way
    hooked, gathered = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
    hooked.register_forward_hook(lambda module, given, out: out * 2)
    gathered.weight.ds_id = 0  # type: ignore[attr-defined]
    assert joined(plain, plain)
    assert not joined(plain, hooked) and torch.equal(project(x, plain, hooked)[1], 2 * (x @ hooked.weight.T))
    assert not joined(plain, gathered) and not joined(plain, ResidualLinear(6, 8)) and not joined(plain, nn.Linear(6, 8))
