"""What only a GPU can show, beside the kernels' own tests: `pytest -m gpu tests/model`."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.dispatch import grouped_linear
from model.grouped import lacks_grouped_mm
from model.loss import token_loss
from model.moe import MoE
from model.operators import has_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def test_grouped_product_with_empty_experts() -> None:
    counts = torch.tensor([500, 0, 17, 0, 0, 1, 300, 0], device="cuda")
    x = torch.randn(818, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expert = torch.repeat_interleave(torch.arange(8, device="cuda"), counts)
    out = grouped_linear(x, counts.cumsum(0, dtype=torch.int32), weight)
    expected = torch.einsum("ra,rba->rb", x.float(), weight.float()[expert])
    dout = torch.randn_like(out)
    poison = torch.full_like(weight, float("nan"))
    del poison  # what is freed here is where the gradient will lie
    ours = [out, *torch.autograd.grad(out, [x, weight], dout)]
    theirs = [expected, *torch.autograd.grad(expected, [x, weight], dout.float())]
    assert all(relative(a, b) < 0.01 for a, b in zip(ours, theirs, strict=True))
    assert not ours[2][counts == 0].any()


@pytest.mark.parametrize("documents", [False, True])
def test_no_host_synchronisation_in_forward_and_backward(documents: bool) -> None:
    """One would stall the GPU in every layer. Called as the trainer calls it: a float, and positions on the host."""
    if lacks_grouped_mm(torch.device("cuda")) and not has_triton():
        pytest.skip("PyTorch's grouped_mm is a loop that reads its offsets before sm90, and Triton's kernel is not there")
    config = MoEGPTConfig.preset("800m", num_hidden_layers=2, vocab_size=512, attn_implementation="flash")
    model = MoEGPTForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 512, (2, 257), device="cuda")
    positions = torch.cat((torch.arange(100), torch.arange(156))).expand(2, -1).contiguous().pin_memory()
    more = {"position_ids": positions} if documents else {}

    def step() -> None:
        model(ids[:, :-1], shift_labels=ids[:, 1:], num_items_in_batch=512.0, **more).loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_model_is_near_fp32_on_the_cpu(attention: str, packed: bool) -> None:
    torch.manual_seed(0)
    config = MoEGPTConfig.preset("tiny", vocab_size=512, attn_implementation="eager", initializer_range=0.05)
    exact = MoEGPTForCausalLM(config)
    for layer in exact.model.layers:  # the same experts on both, or a token near a tie hides the rest
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0]))
    ours = MoEGPTForCausalLM(MoEGPTConfig.from_dict({**config.to_dict(), "attn_implementation": attention}))
    ours.load_state_dict(exact.state_dict())
    ours.to("cuda", torch.bfloat16)
    ids = torch.randint(0, 512, (2, 257))
    positions = torch.cat((torch.arange(100), torch.arange(156))).expand(2, -1) if packed else None
    on_gpu = None if positions is None else positions.cuda()
    theirs = exact(ids[:, :-1], shift_labels=ids[:, 1:], position_ids=positions).loss
    loss = ours(ids[:, :-1].cuda(), shift_labels=ids[:, 1:].cuda(), position_ids=on_gpu).loss
    assert float(loss) == pytest.approx(float(theirs), abs=0.02)
    theirs.backward()
    loss.backward()
    for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
        if name.endswith("sinks") or b.grad.abs().max() == 0:
            continue  # a handful of numbers that cancel
        assert relative(a.grad.cpu(), b.grad) < 0.05, name


def test_loss_memory_and_time() -> None:
    """8,192 tokens x 49,152: a quarter of the plain way's peak, and not slower."""
    targets = torch.randint(0, 49_152, (8192,), device="cuda")
    x = torch.randn(8192, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(49_152, 1536, device="cuda") / 40).bfloat16().requires_grad_()

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(x, head).float(), targets)

    def ours() -> torch.Tensor:
        return token_loss(x, head, targets)

    peaks, times, gradients = [], [], []
    for function in (plain, ours):

        def once(function: Callable[[], torch.Tensor] = function) -> None:
            x.grad = head.grad = None
            function().backward()

        times.append(milliseconds(once))
        gradients.append([x.grad.clone(), head.grad.clone()])
        x.grad = head.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] / 4, peaks
    assert times[1] <= 1.1 * times[0], times
    assert all(relative(a, b) < 0.01 for a, b in zip(gradients[1], gradients[0], strict=True))


def test_routing_is_the_same_on_cpu_and_gpu_under_ties() -> None:
    moe = MoE(MoEGPTConfig.preset("tiny"))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        moe.gate.weight.zero_()
    x = torch.randn(1000, 256)
    here = moe.gate(x)[1]
    assert torch.equal(moe.gate.cuda()(x.cuda())[1].cpu(), here)
