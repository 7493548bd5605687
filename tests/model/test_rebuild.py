"""Saving less changes no bit of a gradient, repeats nothing that is dear, and saves less."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.modeling import Block
from model.rebuild import is_rebuilding, rebuildable, rebuilding, rebuilt

#: What must not run twice: products, attention, the choice of experts and the order of their rows.
DEAR = {"mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu", "topk", "sort", "native_dropout"}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name.split("::")[-1]] += 1
        return func(*args, **(kwargs or {}))


def train(rebuilds: bool, dtype: torch.dtype, routing: str = "spread", **fields: Any) -> tuple[list[Tensor], Counter[str]]:
    """Loss and gradients, and the operations that took."""
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 40, "num_hidden_layers": 2}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**small, **fields})).train().to(dtype)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.rebuilds = rebuilds
        bias = {"spread": torch.linspace(0.01, -0.01, 8), "one expert": torch.eye(8)[5] * 9, "empty": torch.arange(8) // 4 * 9.0}
        block.mlp.gate.e_score_correction_bias.copy_(bias[routing])
    ids = torch.randint(0, 97, (4, 50))
    with Calls() as calls:
        loss = model(ids, labels=ids).loss
        loss.backward()
    load = model.model.layers[0].mlp.gate.load_E
    assert {"spread": load.all(), "one expert": load[5] == 200, "empty": not load[:4].any()}[routing]
    return [loss.detach(), *(p.grad for p in model.parameters())], calls.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"routing": "one expert", "attn_implementation": "sdpa"},
        {"routing": "empty", "attn_implementation": "eager"},
        {"expert_dropout": 0.3},
        {"qk_norm": False},
        {"router_aux_loss_coef": 0.01},
    ],
    ids=str,
)
def test_bit_equal_and_nothing_dear_runs_twice(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    plain, calls = train(False, dtype, **fields)
    less, calls_again = train(True, dtype, **fields)
    assert len(plain) > 20 and any(gradient.any() for gradient in plain[1:])
    assert all(torch.equal(a, b) for a, b in zip(plain, less, strict=True))
    assert {name: calls[name] for name in DEAR} == {name: calls_again[name] for name in DEAR}
    assert calls["mm"] and calls["sort"] and calls_again["silu"] > calls["silu"]  # and this does
    if not fields.get("qk_norm", True):  # nobody keeps what q and k were turned from, which is as large
        assert calls["addcmul"] == calls_again["addcmul"]


def test_saves_what_it_says() -> None:
    """A token's bytes by hand, H 64, I and shared 40, 4 heads of 16 and 2 of keys, top 2: a block keeps two inputs, q and k before
    their norm, v, attention's output and logsumexp, gates and ups; the rest is order and choice."""

    def saved(rebuilds: bool) -> float:
        block = Block(MoEGPTConfig.preset("tiny", hidden_size=64, moe_intermediate_size=40, attn_implementation="flash"), 0)
        block.bfloat16().rebuilds = rebuilds
        nn.init.normal_(block.self_attn.sinks)
        return saved_bytes(block, torch.randn(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)) / 128

    wide = 2 * 64 + (64 + 32) + 32 + 64 + 2 * 40 + 2 * (2 * 40)
    assert saved(True) == pytest.approx(2 * wide + 4 * 4 + 8 * 4 + 8 * 8 + 2 * 3 * 8, rel=0.03)
    assert saved(False) > 2 * saved(True)


def saved_bytes(block: Block, x: Tensor) -> int:
    """Of all storages that are alive after a forward and were not before, output and weights aside."""
    from model.mask import causal_mask
    from model.replay import RouterReplay
    from model.rope import RotaryTable

    rope = RotaryTable(block.self_attn.config)(None, 0, x.shape[1], x.device)
    mask = causal_mask((x.shape[0], x.shape[1]), 0, x.device, None, None)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor) and not func.is_view:
                    alive.add(leaf.untyped_storage())
            return out

    with Follow():
        out = block(x, rope=rope, mask=mask, replay=RouterReplay())
    gc.collect()
    given = {id(t.untyped_storage()) for t in (out, *block.parameters(), *block.buffers())}
    return x.untyped_storage().nbytes() + sum(s.nbytes() for s in alive if id(s) not in given)


def test_made_again_once_for_all_who_ask_and_let_go() -> None:
    made: list[weakref.ref[Tensor]] = []

    def double(x: Tensor) -> Tensor:
        out = x * 2
        made.append(weakref.ref(out))
        return out

    x, a, b = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with rebuilding():
        y = rebuildable(double(x), double, x)
        first = weakref.ref(y)
        loss = (y @ a).sum() + (y.T[:, 1:] @ b[1:]).sum() + rebuildable(y.exp(), torch.exp, y).sum()  # the last is saved by nobody
        del y
    assert first() is None  # already after the forward, as it was saved by nobody
    loss.backward()
    gc.collect()
    assert len(made) == 2 and made[1]() is None
    assert torch.allclose(a.grad, (2 * x).T @ torch.ones(4, 4)) and torch.allclose(
        b.grad[1:], (2 * x.T[:, 1:]).T @ torch.ones(4, 4)
    )


def test_what_leads_to_nobody_holds_nothing() -> None:
    """Two steps on from what is saved, of which the backward wants neither: it asks once, and lets go."""
    made: list[weakref.ref[Tensor]] = []

    def double(x: Tensor) -> Tensor:
        out = x * 2
        made.append(weakref.ref(out))
        return out

    def negative(x: Tensor) -> Tensor:
        return -x

    x, a = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    with rebuilding():
        y = rebuildable(double(x), double, x)
        one = rebuildable(negative(y), negative, y)
        two = rebuildable(negative(one), negative, one)
        loss = (y @ a).sum() + two.sum()
        del y, one, two
    loss.backward(retain_graph=True)  # the graph, and the recipes with it, stay
    assert len(made) == 2 and made[1]() is None


def test_a_weight_that_is_taken_away_is_kept_for_what_is_made_of_it() -> None:
    """ZeRO 3 takes it after its module's call, and brings it back for that module's backward alone."""
    weight, x = nn.Parameter(torch.randn(4)), torch.randn(3, 4)
    weight.ds_id = 0  # type: ignore[attr-defined]
    other, expected = torch.randn(4, 5, requires_grad=True), x * weight.detach()
    with rebuilding():
        normed = rebuildable(x * weight, torch.mul, x, weight)
        loss = (normed @ other).sum()
        del normed
    weight.data = torch.empty(0)
    (found,) = torch.autograd.grad(loss, other)
    torch.testing.assert_close(found, expected.T @ torch.ones(3, 5))


def test_a_frozen_input_has_no_gradient_of_anothers() -> None:
    frozen, trained = torch.randn(3), torch.randn(3, requires_grad=True)
    with rebuilding():
        out = rebuilt(lambda a, b: a.sin() * b.cos(), frozen, trained)
    (found,) = torch.autograd.grad(out.sum(), trained)
    torch.testing.assert_close(found, -frozen.sin() * trained.sin())


def test_it_is_open_in_its_thread_and_until_its_end() -> None:
    seen = [is_rebuilding()]
    with rebuilding():
        other = threading.Thread(target=lambda: seen.append(is_rebuilding()))
        other.start()
        other.join()
        with pytest.raises(RuntimeError, match="stop"), rebuilding():
            raise RuntimeError("stop")
        assert is_rebuilding()
    seen.append(is_rebuilding())
    with pytest.raises(RuntimeError, match="stop"), rebuilding():
        raise RuntimeError("stop")
    assert [*seen, is_rebuilding()] == [False] * 4


def test_outside_of_it_nothing_is_made_again() -> None:
    x = torch.randn(3, requires_grad=True)
    with rebuilding(False):
        assert rebuilt(torch.sin, x).grad_fn.name() == "SinBackward0"
    with rebuilding(), torch.no_grad():
        assert rebuilt(torch.sin, x).grad_fn is None
    with rebuilding():
        assert rebuilt(torch.sin, x).grad_fn.name() == "AgainBackward"
