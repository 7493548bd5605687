"""The regions that `torch.compile` takes are one graph each, with the outputs and gradients of eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.attention import prepare
from model.mask import causal_mask

SHAPE = (2, 32)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(attention: str = "flash", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> MoEGPTForCausalLM:
    sizes = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 32, **fields}
    config = MoEGPTConfig.preset("tiny", **sizes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = MoEGPTForCausalLM(config).train()
    model.model.layers[0].self_attn.sinks.data.normal_()
    return model.to(dtype)


def outputs_and_gradients(module: nn.Module, region: Callable[..., Any]) -> list[Tensor]:
    dtype = next(module.parameters()).dtype
    x = torch.randn(*SHAPE, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    module.zero_grad()
    out = region(x)
    outs = out if isinstance(out, tuple) else (out,)
    torch.stack([o.float().square().sum() for o in outs]).sum().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert x.grad is not None and gradients
    return [*(o.detach() for o in outs), x.grad, *gradients]


Region = tuple[nn.Module, Callable[[Tensor], Any]]


def attend(attention: str, documents: bool) -> Region:
    model = build(attention)
    positions = torch.cat((torch.arange(12), torch.arange(20))).expand(2, -1) if documents else None
    mask = causal_mask(SHAPE, 0, torch.device("cpu"), positions)
    rope = model.model.rotary(positions, 0, SHAPE[1], torch.device("cpu"))
    prepare(attention, torch.zeros(1, dtype=torch.bfloat16), model.config.head_dim, mask)
    block = model.model.layers[0]
    return block, lambda x: block.attend(x, rope, mask, None, False)


def mixture(dtype: torch.dtype = torch.bfloat16, autocast: bool = False, **fields: Any) -> Region:
    mlp = build(dtype=dtype, **fields).model.layers[0].mlp

    def region(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out: Tensor = mlp(x)
            return out

    return mlp, region


def loss() -> Region:
    head = build().lm_head
    targets = torch.arange(64).view(SHAPE)
    return head, lambda x: head(x, targets, 64.0, 1e-4)


REGIONS: dict[str, Callable[[], Region]] = {
    **{f"attention, {a}": lambda a=a: attend(a, False) for a in ("flash", "sdpa", "eager")},  # type: ignore[misc]
    **{f"attention, {a}, documents": lambda a=a: attend(a, True) for a in ("flash", "sdpa", "eager")},  # type: ignore[misc]
    "mixture of experts": mixture,
    # Of these dynamo knows no grouped product.
    "mixture of experts, fp32": lambda: mixture(torch.float32),
    "mixture of experts, fp16": lambda: mixture(torch.float16),
    "mixture of experts, autocast": lambda: mixture(torch.float32, autocast=True),
    "mixture of experts, odd width": lambda: mixture(moe_intermediate_size=33),
    "loss": loss,
}


#: The others, which do not train by default, are for `make soak`.
FIRST = ("attention, flash", "mixture of experts", "mixture of experts, fp32", "mixture of experts, autocast", "loss")
EACH = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in REGIONS]


@pytest.mark.parametrize("name", EACH)
def test_a_region_is_one_graph_and_the_same_to_the_bit(name: str) -> None:
    module, region = REGIONS[name]()
    expected = outputs_and_gradients(module, region)
    found = outputs_and_gradients(module, torch.compile(region, fullgraph=True, backend="aot_eager"))
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_inductor_agrees_to_rounding(name: str) -> None:
    module, region = REGIONS[name]()
    expected = outputs_and_gradients(module, region)
    found = outputs_and_gradients(module, torch.compile(region, fullgraph=True, backend="inductor"))
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2  # bf16 has 8 bits
