"""The fused loss against the formula written out and against PyTorch's own."""

import gc
import time

import pytest
import torch
import torch.nn.functional as F

from launch.benchmarks.measure import PeakBytes
from model import heuristics
from model import loss as loss_module
from model.loss import IGNORE, loss_of_logits, token_loss
from tests import reference


def case(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    head = (torch.randn(vocab, hidden, dtype=dtype) / hidden**0.5 * 3).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    targets[::5] = IGNORE
    targets[1] = vocab - 1  # end-of-text ids sit at either end: a target like any other
    targets[2] = 0
    return x, head, targets


@pytest.mark.parametrize("z_weight", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("num_items", [None, 17.0, "tensor"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_against_the_formula_in_float64(
    z_weight: float, num_items: object, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, head, targets = case(43, 6, 29, torch.float64)
    monkeypatch.setattr(heuristics, "CHUNK_BYTES", chunk_rows * 8 * 29)
    given = torch.tensor(31) if num_items == "tensor" else num_items
    count = {None: float((targets >= 0).sum()), 17.0: 17.0, "tensor": 31.0}[num_items]  # type: ignore[index]
    expected = reference.cross_entropy(x, head, targets, count, z_weight)
    ours = token_loss(x, head, targets, given, z_weight)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    of_logits = loss_of_logits(F.linear(x, head), targets, given, z_weight)  # type: ignore[arg-type]
    torch.testing.assert_close(of_logits, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours * 3, [x, head]), torch.autograd.grad(expected * 3, [x, head]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_pytorch(dtype: torch.dtype) -> None:
    x, head, targets = case(700, 64, 500, dtype)
    ours, of_logits = token_loss(x, head, targets), loss_of_logits(F.linear(x, head), targets, None, 0.0)
    exact = F.cross_entropy(F.linear(x.double(), head.double()), targets)
    for loss in (ours, of_logits):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=2e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [x, head]), torch.autograd.grad(exact, [x, head]), strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).norm() / b.norm()
        assert error < (6e-3 if dtype == torch.bfloat16 else 1e-6), float(error)


def test_fp16_keeps_its_gradients_under_a_loss_scale() -> None:
    """Of a step of half a million tokens: a softmax over so many is below fp16's smallest number, until the loss scale comes."""
    x, head, targets = case(300, 64, 1000, torch.float16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, head)]
    items, loss_scale = 2.0**19, 2.0**16
    exact = F.cross_entropy(F.linear(*wide), targets, reduction="sum") / items
    ours = token_loss(x, head, targets, items)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)
    for a, b in zip(torch.autograd.grad(ours * loss_scale, [x, head]), torch.autograd.grad(exact, wide), strict=True):
        assert a.dtype == torch.float16
        error = (a.double() / loss_scale - b).norm() / b.norm()
        assert error < 2e-3, float(error)


@pytest.mark.parametrize(
    ("dtype", "dtypes"),
    [(torch.bfloat16, [torch.bfloat16] * 2), (torch.float16, [torch.float16, torch.float32, torch.float32])],
)
def test_what_waits_for_the_backward(dtype: torch.dtype, dtypes: list[torch.dtype]) -> None:
    """The inputs' gradients, as narrow as they are but for the head's in fp16: a sum over tokens that nothing has scaled yet."""
    saved = token_loss(*case(20, 4, 9, dtype)).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [x.dtype for x in saved if x is not None] == dtypes


def test_the_heads_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a hundred chunks: in bf16 each addition would round the sum again, and small ones would be lost."""
    x, head, targets = case(800, 64, 50, torch.bfloat16)
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x.double(), head.double()), targets), head)[0]
    errors = []
    for rows in (800, 8):
        monkeypatch.setattr(heuristics, "CHUNK_BYTES", rows * 4 * 50)
        ours = torch.autograd.grad(token_loss(x, head, targets), head)[0]
        errors.append(float((ours.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.2 * errors[0] and errors[0] < 6e-3, errors


def test_micro_batches_add_up_to_the_global_mean() -> None:
    """Whatever the split and however uneven the padding, with the global count the parts sum to the whole."""
    x, head, targets = case(60, 8, 20, torch.float64)
    whole = token_loss(x, head, targets)
    items = (targets != IGNORE).sum()
    parts = sum(token_loss(x[a:b], head, targets[a:b], items) for a, b in ((0, 3), (3, 41), (41, 60)))
    torch.testing.assert_close(parts, whole)
    uneven = sum(token_loss(x[a:b], head, targets[a:b]) for a, b in ((0, 3), (3, 41), (41, 60))) / 3
    assert abs(float(uneven - whole)) > 1e-3  # the mean of means is something else


def test_without_any_target_the_loss_is_zero() -> None:
    x, head, _ = case(5, 4, 9, torch.float32)
    nothing = torch.full((5,), IGNORE)
    ours = token_loss(x, head, nothing)
    ours.backward()
    assert float(ours) == float(loss_of_logits(F.linear(x, head), nothing, None, 0.0)) == 0
    assert x.grad is not None and float(x.grad.abs().sum()) == 0


@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_of_the_vocabulary_is_refused(target: int) -> None:
    x, head, targets = case(5, 4, 9, torch.float32)
    targets[3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_loss(x, head, targets)


def test_huge_logits_stay_finite() -> None:
    x, head, targets = case(50, 8, 30, torch.float32)
    ours = token_loss(x * 1e4, head, targets)
    assert ours.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(ours, [x, head]))


def test_a_second_backward_is_right_too() -> None:
    x, head, targets = case(20, 4, 9, torch.float64)
    ours = token_loss(x, head, targets)
    first = torch.autograd.grad(ours, [x, head], retain_graph=True)
    second = torch.autograd.grad(ours, [x, head])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused() -> None:
    """Ours would be that of a linear loss."""
    x, head, targets = case(20, 4, 9, torch.float64)
    (dx,) = torch.autograd.grad(token_loss(x, head, targets).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_has_the_loss_of_narrow_inputs() -> None:
    """And gradients in the dtypes of the wide ones that it was given."""
    x, head, targets = case(60, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_loss(x, head, targets)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, head)]
    expected = token_loss(*narrow, targets)
    assert torch.equal(ours, expected) and not torch.equal(ours, token_loss(x, head, targets))
    for a, b in zip(torch.autograd.grad(ours, [x, head]), torch.autograd.grad(expected, narrow), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_a_head_alone_can_be_trained() -> None:
    x, head, targets = case(20, 4, 9, torch.float64)
    both, alone = (torch.autograd.grad(token_loss(given, head, targets), head) for given in (x, x.detach()))
    assert torch.equal(*both, *alone)


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, head, targets = case(20, 4, 9, torch.float64)
    calls: list[bool] = []
    chunk_loss = loss_module.chunk_loss
    monkeypatch.setattr(loss_module, "chunk_loss", lambda *given: calls.append(given[-1]) or chunk_loss(*given))  # type: ignore[func-returns-value]
    with torch.no_grad():
        evaluated = token_loss(x, head, targets)
    token_loss(x.detach(), head.detach(), targets)
    assert not evaluated.requires_grad and calls and not any(calls)
    torch.testing.assert_close(evaluated, token_loss(x, head, targets).detach())


def plain(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, head).float(), targets)


def test_peak_memory_is_a_quarter_of_the_plain_way() -> None:
    """8,192 tokens x 49,152, on the meta device: the shapes decide, nothing is computed."""
    peaks = []
    for function in (plain, lambda *args: loss_module.token_loss(*args)):
        x = torch.empty(8192, 1536, dtype=torch.bfloat16, device="meta", requires_grad=True)
        head = torch.empty(49_152, 1536, dtype=torch.bfloat16, device="meta", requires_grad=True)
        targets = torch.empty(8192, dtype=torch.long, device="meta")
        with PeakBytes() as peak:
            function(x, head, targets).backward()
            gc.collect()
        peaks.append(peak.most)
    assert peaks[0] > 4e9  # fp32 logits, their log-softmax and its gradient: the measurement sees them
    assert peaks[1] <= peaks[0] / 4, peaks


@pytest.mark.slow
def test_not_slower_than_the_plain_way() -> None:
    x, head, targets = case(2048, 512, 49_152, torch.bfloat16)
    times = {}
    for name, function in {"plain": plain, "ours": token_loss}.items():
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            function(x, head, targets).backward()
            best = min(best, time.perf_counter() - start)
        times[name] = best
    assert times["ours"] < 1.1 * times["plain"], times
