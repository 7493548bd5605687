"""Which flash kernel is taken where; that ours calls it right (against a stand-in, without a GPU); and on a GPU every
kernel present against the formula: `pytest -m gpu tests/model`."""

import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import flash
from model.attention import eager_attention, flash_attention, sdpa_attention
from model.flash import PICKED, CpuFlash, FlashKernel, FlashOutput, kernel_preference, load_kernel, pick_kernel
from model.mask import AttentionMask, causal_mask
from model.sinks import attend_with_sinks
from tests import reference


@pytest.fixture
def switch() -> Iterator[Callable[[bool], None]]:
    """Of PyTorch's deterministic algorithms; as before at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    load_kernel.cache_clear()
    PICKED.clear()
    yield
    load_kernel.cache_clear()
    PICKED.clear()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "expected"),
    [
        ("cpu", torch.float32, 64, 0, ("cpu",)),
        ("cpu", torch.bfloat16, 80, 0, ("cpu",)),
        ("cuda", torch.bfloat16, 64, 80, ("flash_attn_2", "torch")),
        ("cuda", torch.float16, 128, 89, ("flash_attn_2", "torch")),
        ("cuda", torch.bfloat16, 64, 90, ("flash_attn_3", "flash_attn_4", "flash_attn_2", "torch")),
        ("cuda", torch.bfloat16, 64, 100, ("flash_attn_4", "flash_attn_2", "torch")),
        ("cuda", torch.bfloat16, 64, 120, ("flash_attn_2", "torch")),
        ("cuda", torch.float32, 64, 90, ()),
        ("cuda", torch.bfloat16, 60, 90, ()),
        ("cuda", torch.bfloat16, 64, 75, ()),
        ("mps", torch.float32, 64, 0, ()),
    ],
)
def test_kernel_preference(device: str, dtype: torch.dtype, head_dim: int, capability: int, expected: tuple[str, ...]) -> None:
    assert kernel_preference(device, dtype, head_dim, capability) == expected


def test_cpu_kernel_is_picked_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model.flash"):
        first = pick_kernel(torch.device("cpu"), torch.float32, 64)
        assert pick_kernel(torch.device("cpu"), torch.float32, 64) is first
    assert first is not None and first.name == "PyTorch's CPU flash kernel"
    assert [r.message for r in caplog.records] == ["attention on cpu in torch.float32: PyTorch's CPU flash kernel"]


def test_missing_packages_are_skipped_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="model.flash"):
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
            if importlib.util.find_spec(flash.MODULES[name].split(".")[0]) is None:
                assert load_kernel(name) is None
    assert not caplog.records


def test_a_package_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """flash-attn built against another torch fails with an undefined symbol: go on without it, and say so."""

    def broken() -> FlashKernel:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(flash.MODULES, "flash_attn_2", "json")
    monkeypatch.setitem(flash.LOADERS, "flash_attn_2", broken)
    with caplog.at_level(logging.WARNING, logger="model.flash"):
        assert load_kernel("flash_attn_2") is None
    assert "json is installed but does not load, so it is not used: undefined symbol" in caplog.text


def test_without_a_flash_kernel_sdpa_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "kernel_preference", lambda *_: ())
    q, k, v, sinks = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(4)
    mask = causal_mask((1, 9), 0, torch.device("cpu"))
    assert torch.equal(flash_attention(q, k, v, sinks, mask), sdpa_attention(q, k, v, sinks, mask))


class Standin:
    """Packages' low-level functions with the signatures of their sources, computed by PyTorch's CPU kernel.

    What it proves is that our adapters call them as they want to be called; what the real kernels compute is for
    the tests marked `gpu`.
    """

    cpu = CpuFlash()
    told: Any = None  # what the last backward was told of `deterministic`

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cu: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, _ = cls.cpu.forward(q, k, v, cls.mask(q, k, causal, cu), scale)
        return out, lse

    @classmethod
    def backward(
        cls, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
        cu: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return cls.cpu.backward(dout, q, k, v, FlashOutput(out, lse), cls.mask(q, k, causal, cu), scale)

    @staticmethod
    def mask(q: Tensor, k: Tensor, causal: bool, cu: Tensor | None) -> AttentionMask:
        assert causal == (q.shape[-3] > 1)
        seqlens = None if cu is None else tuple(cu.diff().tolist())
        return AttentionMask(queries=q.shape[-3], keys=k.shape[-3], device=q.device, seqlens=seqlens, cu_seqlens=cu)

    @classmethod
    def fa2_forward(
        cls, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        out, lse = cls.forward(q, k, v, causal, softmax_scale, None)
        return out, lse, None, torch.zeros(2)

    @classmethod
    def fa2_backward(
        cls, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert rng_state is not None and alibi_slopes is None
        cls.told = deterministic
        gradients = cls.backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale, None)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)

    @classmethod
    def fa2_varlen_forward(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == int(cu_seqlens_q.diff().max())
        out, lse = cls.forward(q, k, v, causal, softmax_scale, cu_seqlens_q)
        return out, lse, None, torch.zeros(2)

    @classmethod
    def fa2_varlen_backward(
        cls, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert rng_state is not None and alibi_slopes is None
        cls.told = deterministic
        gradients = cls.backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale, cu_seqlens_q)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)

    @classmethod
    def fa3_forward(
        cls, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        out, lse = cls.forward(q, k, v, causal, softmax_scale, cu_seqlens_q)
        return out, lse, None, None

    @classmethod
    def fa3_backward(
        cls, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        *, deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        cls.told = deterministic
        gradients = cls.backward(dout, q, k, v, out, softmax_lse, is_causal, softmax_scale, cu_seqlens_q)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)

    @classmethod
    def fa4_forward(
        cls, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, return_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert return_lse
        out, lse = cls.forward(q, k, v, causal, softmax_scale, cu_seqlens_q)
        return out, lse, None, None

    @classmethod
    def fa4_backward(
        cls, q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        cls.told = deterministic
        return cls.backward(dout, q, k, v, out, lse, causal, softmax_scale, cu_seqlens_q)


def install_standin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(flash.MODULES[name])
    prefix = {"flash_attn_2": "fa2", "flash_attn_3": "fa3", "flash_attn_4": "fa4"}[name]
    public = ["_flash_attn_fwd", "_flash_attn_bwd"] if prefix == "fa4" else ["_flash_attn_forward", "_flash_attn_backward"]
    setattr(module, public[0], getattr(Standin, f"{prefix}_forward"))
    setattr(module, public[1], getattr(Standin, f"{prefix}_backward"))
    if prefix == "fa2":
        module._flash_attn_varlen_forward = Standin.fa2_varlen_forward  # type: ignore[attr-defined]
        module._flash_attn_varlen_backward = Standin.fa2_varlen_backward  # type: ignore[attr-defined]
    known: dict[str, Any] = {flash.MODULES[name]: module, "flash_attn": SimpleNamespace(__version__="2.8.3")}
    real = importlib.import_module
    finder = SimpleNamespace(find_spec=lambda module_name: known.get(module_name))
    importer = SimpleNamespace(import_module=lambda m: known.get(m) or real(m), util=finder)
    monkeypatch.setattr(flash, "importlib", importer)


PACKED = torch.cat((torch.arange(30), torch.arange(1), torch.arange(46)))[None].expand(2, -1)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_adapters_call_the_packages_right(
    name: str, packed: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch, switch: Callable[[bool], None]
) -> None:
    switch(deterministic)
    install_standin(name, monkeypatch)
    monkeypatch.setattr(Standin, "told", None)
    kernel = load_kernel(name)
    assert kernel is not None and kernel.name == {"flash_attn_2": "flash-attn 2.8.3"}.get(name, name.replace("_attn_", "-attn "))
    against_the_formula(name, torch.device("cpu"), torch.float64, packed, limit=1e-9)
    assert Standin.told is (deterministic and name == "flash_attn_2")


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4"])
def test_a_kernel_that_keeps_no_order_is_passed_over_where_one_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, switch: Callable[[bool], None]
) -> None:
    """Of flash-attn 3 and 4 a release may take the argument and drop it, or end the run over it, and its signature does not say."""
    install_standin(name, monkeypatch)
    monkeypatch.setattr(flash, "kernel_preference", lambda *_: (name, "torch"))
    names = []
    for deterministic in (False, True, False):  # the answer is kept, for each of the two
        switch(deterministic)
        picked = pick_kernel(torch.device("cpu"), torch.bfloat16, 64)
        assert picked is not None
        names.append(picked.name)
    newer = name.replace("_attn_", "-attn ")
    assert names == [newer, "PyTorch's CUDA flash kernel", newer]


def against_the_formula(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    limit: float,
    heads: tuple[int, int] = (8, 2),
    length: int = 77,
    head_dim: int = 64,
    sink: float = 0.0,
) -> None:
    shapes = [(2, length, heads[0], head_dim), (2, length, heads[1], head_dim), (2, length, heads[1], head_dim)]
    leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    sinks = (sink + torch.randn(heads[0], device=device)).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    leaves.append(sinks)
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    positions = PACKED.to(device) if packed else None
    allowed = reference.allowed_pairs(PACKED) if packed else torch.ones(2, length, length, dtype=torch.bool).tril()
    mask = causal_mask((2, length), 0, device, position_ids=positions)
    out = flash_attention(*leaves, mask, kernel=name)
    # A sink of its own for each query: dsinks is the sum of its terms, which may cancel, so its error is measured by their sizes.
    exact[3] = exact[3].detach()[:, None, None, None].repeat(1, 2, length, 1).requires_grad_()
    expected = reference.attention_with_sinks(*exact, allowed)
    dout = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, leaves, dout)]
    *theirs, terms = [expected, *torch.autograd.grad(expected, exact, dout.cpu().double())]
    theirs.append(terms.flatten(1).sum(1))
    for label, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), ours, theirs, strict=True):
        size = terms.flatten(1).abs().sum(1) if label == "dsinks" else b.detach()
        error = float((a.detach().cpu().double() - b.detach()).norm() / size.norm().clamp(min=1e-12))
        assert error < limit, (label, error)


@pytest.mark.parametrize("packed", [False, True])
def test_pytorchs_cuda_kernel_takes_our_arguments(packed: bool) -> None:
    """On the meta device: PyTorch checks the call against the operator's schema and works out the shapes."""
    meta = torch.device("meta")
    q, k, v = (torch.empty(2, 77, n, 64, device=meta, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2))
    sinks = torch.empty(8, device=meta, requires_grad=True)
    seqlens = (30, 1, 46, 30, 1, 46) if packed else None
    cu_seqlens = torch.empty(7, dtype=torch.int32, device=meta) if packed else None
    mask = AttentionMask(queries=77, keys=77, device=meta, seqlens=seqlens, cu_seqlens=cu_seqlens)
    kernel = load_kernel("torch")
    assert kernel is not None
    given = [x.flatten(0, 1) if packed else x for x in (q, k, v)]
    out = attend_with_sinks(*given, sinks, kernel, mask, 0.125)
    assert out.shape == given[0].shape and out.dtype == torch.bfloat16
    out.backward(torch.empty_like(out))
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v, sinks))


GPU = [name for name in flash.LOADERS if name != "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 4), (8, 2), (8, 1), (24, 8)])
@pytest.mark.parametrize("sink", [-20.0, 0.0, 20.0])
def test_on_a_gpu(name: str, packed: bool, heads: tuple[int, int], sink: float) -> None:
    skip_unless_usable(name)
    # At a sink of 20 the output is e^-20 of the values: what is left is measured relative to itself all the same.
    against_the_formula(name, torch.device("cuda"), torch.bfloat16, packed, limit=0.012, heads=heads, sink=sink)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
@pytest.mark.parametrize("length", [1, 63, 128, 1000, 2048])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths_on_a_gpu(name: str, length: int, head_dim: int) -> None:
    skip_unless_usable(name)
    device = torch.device("cuda")
    against_the_formula(name, device, torch.bfloat16, False, limit=0.012, length=length, head_dim=head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_same_to_the_bit_on_a_gpu(name: str, packed: bool, switch: Callable[[bool], None]) -> None:
    skip_unless_usable(name)
    switch(True)
    kernel, device = load_kernel(name), torch.device("cuda")
    if kernel is None or not kernel.deterministic:
        pytest.skip(f"{name} has no deterministic backward")
    shapes = [(4, 2048, heads, 64) for heads in (24, 8, 8)]
    leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    positions = torch.arange(512, device=device).repeat(4)[None].expand(4, -1) if packed else None
    mask, sinks = causal_mask((4, 2048), 0, device, position_ids=positions), torch.randn(24, device=device)
    out = flash_attention(*leaves, sinks, mask, kernel=name)
    dout = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
def test_documents_are_bit_isolated_on_a_gpu(name: str) -> None:
    skip_unless_usable(name)
    device = torch.device("cuda")
    q, k, v = (torch.randn(1, 300, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2))
    positions = torch.cat((torch.arange(130), torch.arange(170)))[None].to(device)
    mask, sinks = causal_mask((1, 300), 0, device, position_ids=positions), torch.randn(8, device=device)
    first = flash_attention(q, k, v, sinks, mask, kernel=name)
    for x in (q, k, v):
        x[:, :130].normal_()
    second = flash_attention(q, k, v, sinks, mask, kernel=name)
    assert torch.equal(first[:, 130:], second[:, 130:]) and not torch.equal(first[:, :130], second[:, :130])


@pytest.mark.gpu
@pytest.mark.parametrize("function", [eager_attention, sdpa_attention, flash_attention])
def test_one_query_after_a_cache_on_a_gpu(function: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    q, k, v = (torch.randn(2, 40, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2))
    sinks = torch.randn(8, device=device)
    whole = function(q, k, v, sinks, causal_mask((2, 40), 0, device))
    last = function(q[:, -1:], k, v, sinks, causal_mask((2, 1), 39, device))
    torch.testing.assert_close(last, whole[:, -1:], rtol=2e-2, atol=2e-2)


def skip_unless_usable(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if name not in kernel_preference("cuda", torch.bfloat16, 64, 10 * major + minor):
        pytest.skip(f"{name} does not run on compute capability {major}.{minor}")
    if load_kernel(name) is None:
        pytest.skip(f"{name} is not installed")
