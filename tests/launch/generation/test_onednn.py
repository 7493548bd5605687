"""oneDNN's products against float64, by the layers of a model and one by one; nothing is copied, and small ones are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.generation import onednn
from launch.generation.decode_step import DecodeStep
from launch.generation.onednn import FasterProducts, grouped, linear
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.cache import GrowingCache

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="this PyTorch has no oneDNN operator for a linear layer")
OPERATOR = "mkldnn::_linear_pointwise"


def traced(call: Any) -> tuple[Tensor, int]:
    """What it returns, and how many products were oneDNN's."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = call()
    return out, sum(event.count for event in profile.key_averages() if event.key == OPERATOR)


@pytest.mark.parametrize(("rows", "outputs", "count"), [(1, 1024, 1), (15, 1023, 0), (16, 8, 1), (40, 256, 1)])
def test_products_are_those_of_float64(rows: int, outputs: int, count: int) -> None:
    x, weight = torch.randn(rows, 256), torch.randn(outputs, 256)
    out, called = traced(lambda: linear(x, weight))
    assert called == count
    torch.testing.assert_close(out, (x.double() @ weight.double().T).float(), rtol=1e-4, atol=1e-4)


def test_a_run_of_each_expert() -> None:
    x, weight, ends = torch.randn(50, 64), torch.randn(4, 32, 64), torch.tensor([20, 20, 23, 50], dtype=torch.int32)
    out, called = traced(lambda: grouped(x, weight.mT, ends))
    expected = [x[a:b].double() @ weight[e].double().T for e, (a, b) in enumerate(((0, 20), (20, 20), (20, 23), (23, 50)))]
    assert called == 2
    torch.testing.assert_close(out, torch.cat(expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_layers_and_experts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **fields)).eval()
    ids = torch.randint(0, 97, (4, 32))
    with torch.no_grad():
        expected = model.double()(ids).logits
    model.to(dtype)

    def prompt() -> Tensor:
        with FasterProducts():
            return model(ids).logits  # type: ignore[no-any-return]

    logits, called = traced(prompt)
    routers = 2  # which are fp32 in any model
    assert called > routers + 2 * 7 if dtype == torch.float32 else called == routers, called
    if dtype == torch.float32:
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_new_token_reads_the_weights_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in oneDNN's own order would be faster, and twice the memory."""
    monkeypatch.setattr(onednn, "LEAST_BYTES", 97 * 64 * 4)
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", vocab_size=97, hidden_size=64, num_hidden_layers=1)).eval()
    cache = GrowingCache()
    with torch.no_grad():
        model(torch.arange(8)[None], past_key_values=cache)
        step = DecodeStep(model)
    logits, called = traced(lambda: step(torch.tensor([3]), cache))
    assert called >= 1 and float(logits.abs().max()) > 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
        assert float(step(torch.tensor([3]), cache).abs().max()) == 0


def test_gradients_and_other_calls_are_left_alone() -> None:
    x, weight, bias = torch.randn(20, 8), torch.randn(4, 8), torch.randn(4)
    with FasterProducts():
        assert torch.equal(F.linear(x, weight, bias), torch.addmm(bias, x, weight.T))
