"""Names for the profiler: the one place that says which code is which part of a step. Nothing is named while it is not open.

Modules are named by hooks, what is no module by a wrapper around the method, and some autograd functions by themselves
(`timeline.py` reads their names). A backward needs no names: the profiler numbers its nodes as their forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _RecordFunctionFast as Range

from launch.engine.expert_parallel import moe_layers
from launch.profiling.parts import parts_of

# `Range` and not `torch.profiler.record_function`: that is an operator, which selective checkpointing calls in a way of its own,
# and what is computed in such a range is then not seen in it.
PREFIX = "part: "
STEP = "training step"


#: An object, one of its methods, the part that the method is.
Method = tuple[Any, str, str]


@contextmanager
def named_parts(model: nn.Module, methods: Sequence[Method]) -> Iterator[None]:
    """While open, the model's modules and these methods have names in a trace."""
    mixtures = [(layer, name, "dispatch") for layer in moe_layers(model) for name in ("_local", "_exchanged")]
    with ExitStack() as stack:
        for module, part in parts_of(model).items():
            stack.callback(_name_module(module, part))
        for owner, method, part in (*mixtures, *methods):
            stack.callback(_replace(owner, method, _named(getattr(owner, method), part if part == STEP else PREFIX + part)))
        yield


def _name_module(module: nn.Module, part: str) -> Callable[[], None]:
    """Hooks that open and close a range around each forward; returns what removes them."""
    open_ranges: list[Range] = []

    def enter(*_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled region is a part as a whole
            open_ranges.append(Range(PREFIX + part))
            open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        if not torch.compiler.is_compiling() and open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    # Also where the forward is left by an exception: a recomputation ends that way as soon as it has what it needs.
    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """On this one object; returns what undoes it."""
    own = vars(owner).get(name)
    vars(owner)[name] = function

    def undo() -> None:
        if own is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = own

    return undo


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside_a_range(*args: Any, **kwargs: Any) -> Any:
        with Range(name):
            return function(*args, **kwargs)

    return inside_a_range
