"""Where the host waits for the device in a training step: nowhere in the model, at two places of ours a step.

On the meta device nothing can be read back: whatever would wait for a GPU raises there. What copies from the host (and so waits
for the stream where the memory is not pinned) is found by name, and so are the waits of the trainer and the step's hook.
"""

from __future__ import annotations

import ast
import inspect
import traceback
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from launch.engine import step_hook
from launch.run import batches, trainer
from model import MoEGPTConfig, MoEGPTForCausalLM

READS = {"tolist", "item", "float", "int", "bool", "cpu", "numpy", "nonzero", "synchronize"}
MAKES = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
#: Every wait that is left in a step outside of DeepSpeed, and why. AutoEP adds one a MoE layer (the sizes of its exchange),
#: ZeRO one for its check of the norm.
LEFT = {
    "launch.run.trainer:Trainer.reduce_loss_and_flags": 1,  # the loss and the flags, which decide whether to take the step
    "launch.engine.step_hook:StepHook._norm_or_invalid": 1,  # the gradient norm, likewise; ZeRO 1 and 2
    "launch.engine.step_hook:StepHook._norm_groups_or_invalid": 1,  # ZeRO 3's
    "launch.engine.step_hook:StepHook._step_with_norm_judged": 1,  # ZeRO 1's in bf16
    "launch.engine.step_hook:unsharded_grad_norm": 1,  # ZeRO 0's: one of these four runs
}


class Copies(TorchFunctionMode):
    """Counts what makes a tensor on the device from numbers of the host, by the line of ours that does."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in MAKES and result.device.type == "meta":
            ours = [frame for frame in traceback.extract_stack() if "/model/" in frame.filename]
            if ours:
                self.found[f"{ours[-1].filename}:{ours[-1].lineno}"] += 1
        return result


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_model_never_waits_in_a_training_step(attention: str, documents: bool) -> None:
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=2, vocab_size=512, router_balance="quantile")
    config._attn_implementation = attention
    with torch.device("meta"):
        model = MoEGPTForCausalLM(config).bfloat16()
    ids = torch.zeros(2, 256, dtype=torch.long, device="meta")
    positions = torch.cat((torch.arange(100), torch.arange(156))).expand(2, -1)  # on the host, as the loader leaves them
    more = {"position_ids": positions} if documents else {}
    with Copies() as copies:
        model(ids, shift_labels=ids, num_items_in_batch=512.0, **more).loss.backward()  # a float, as the trainer gives it
    assert not copies.found
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" not in name)


def test_the_meta_device_does_show_a_wait() -> None:
    positions = torch.cat((torch.arange(100), torch.arange(156))).expand(2, -1)
    with torch.device("meta"):
        model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", num_hidden_layers=1, vocab_size=512))
    ids = torch.zeros(2, 256, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(ids, position_ids=positions.to("meta"))
    with Copies() as copies:
        copies.__torch_function__(torch.tensor, (), (1.0,), {"device": "meta"})
    assert not copies.found, "this file is not the model's"


def reads(module: ModuleType) -> Counter[str]:
    """Calls that read a tensor back, by the function they stand in; `int` and `float` of what is no tensor are told by `HOST`."""
    found: Counter[str] = Counter()

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
            if isinstance(child, ast.Call):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if called in READS and ast.unparse(child) not in HOST:
                    found[f"{module.__name__}:{inner}"] += 1
            walk(child, inner)

    walk(ast.parse(inspect.getsource(module)), "")
    return found


#: Calls of those names on numbers that are on the host already.
HOST = {
    "float(self.stop.requested())",
    "float(self.saving.checkpoints.written())",
    "float(loss / (self.accumulation * self.world_size))",
}


def test_what_waits_in_a_step_is_listed() -> None:
    found = reads(trainer) + reads(step_hook) + reads(batches)
    assert dict(found) == LEFT
