"""Saving less for the backward: what a cheap pass can make again is not kept but made again, once, when the backward asks for it.

    with rebuilding():
        normed = rebuildable(norm(x), norm, x)   # whoever saves `normed` for its backward saves the way to it from x
        out = linear(normed)

Nothing runs twice but the functions that are named so: no product, no attention, no routing and no exchange. Autograd asks what
to save by its hooks for saved tensors, so that whoever uses such a tensor need not know of it: a plain linear layer, one whose
weight ZeRO 3 gathers, one with LoRA beside it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

Makes = Callable[..., Tensor | tuple[Tensor, ...]]


class Recipe:
    """How some tensors are made: `make(*inputs)`, of the inputs what is kept."""

    def __init__(self, make: Makes, inputs: tuple[Tensor, ...]) -> None:
        self.make = make
        self.saved = [_save(x) for x in inputs]
        self.users = 0  # saved tensors that stand for what it makes
        self.again: tuple[Tensor, ...] = ()
        self.waiting = 0  # users that have not asked yet

    def end_forward(self) -> None:
        """Nobody saved what it makes: then nobody will ask for its inputs."""
        if not self.users:
            for saved in self.saved:
                if isinstance(saved, _View):
                    saved.recipe.users -= 1

    def take(self, index: int) -> Tensor:
        """What it makes, the `index`-th; kept until the last user has asked."""
        if not self.again:
            with torch.no_grad():
                out = self.make(*(_load(x) for x in self.saved))
            self.again, self.waiting = out if isinstance(out, tuple) else (out,), self.users
        tensor = self.again[index]
        self.waiting -= 1
        if not self.waiting:
            self.again = ()
        return tensor


class _View:
    """A saved tensor that is not kept: a view of what a recipe makes."""

    def __init__(self, recipe: Recipe, index: int, tensor: Tensor) -> None:
        recipe.users += 1
        self.recipe, self.index = recipe, index
        self.layout = tensor.size(), tensor.stride(), tensor.storage_offset()

    def load(self) -> Tensor:
        return self.recipe.take(self.index).as_strided(*self.layout)


def _save(tensor: Tensor) -> Any:
    """Of a recipe's input. ZeRO 3 takes a weight away after its module's call, and has it back only for that module's backward."""
    if isinstance(tensor, nn.Parameter):
        return tensor.detach().clone() if hasattr(tensor, "ds_id") else tensor
    return _pack(tensor.detach())


def _pack(tensor: Tensor) -> Any:
    """What stays is saved as the object it is: ZeRO 3 gives a weight its data back by changing that."""
    found = None if _local.open is None else _local.open.by_storage.get(tensor.untyped_storage())
    return tensor if found is None else _View(*found, tensor)


def _load(saved: Any) -> Tensor:
    tensor: Tensor = saved.load() if isinstance(saved, _View) else saved
    return tensor


class _Forward:
    """One `rebuilding`: its recipes, and by the storage of what is made (until it is freed) which of which recipe it is."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.by_storage: WeakKeyDictionary[UntypedStorage, tuple[Recipe, int]] = WeakKeyDictionary()

    def add(self, recipe: Recipe, made: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
        self.recipes.append(recipe)
        given = {id(x.untyped_storage()) for x in inputs}
        for index, storage in enumerate(x.untyped_storage() for x in made):
            if id(storage) not in given:  # else it was a cast to the same
                self.by_storage[storage] = recipe, index

    def end(self) -> None:
        for recipe in reversed(self.recipes):
            recipe.end_forward()


class _Local(threading.local):
    open: _Forward | None = None


_local = _Local()


@contextmanager
def rebuilding(wanted: bool = True) -> Iterator[None]:
    """While open in this thread, what `rebuildable` names is not saved for the backward."""
    if not wanted or not torch.is_grad_enabled():
        yield
        return
    outer, _local.open = _local.open, _Forward()
    try:
        with saved_tensors_hooks(_pack, _load):
            yield
    finally:
        _local.open.end()
        _local.open = outer


def is_rebuilding() -> bool:
    return not torch.compiler.is_compiling() and _local.open is not None and torch.is_grad_enabled()


def rebuildable(made: Any, make: Makes, *inputs: Tensor) -> Any:
    """`made`, a tensor or a tuple of them, which `make(*inputs)` would make again to the bit, in storages of the same layout."""
    if is_rebuilding() and _local.open is not None:
        _local.open.add(Recipe(make, inputs), made if isinstance(made, tuple) else (made,), inputs)
    return made


def rebuilt(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`; while `rebuilding`, neither what it makes nor what lies between is saved."""
    if not is_rebuilding():
        return function(*inputs)
    out: Tensor = rebuildable(Again.apply(function, *inputs), function, *inputs)  # type: ignore[no-untyped-call]
    return out


class Again(torch.autograd.Function):
    """Keeps what it is given, and calls the function once more in the backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(wants) for x, wants in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        found = iter(torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout))
        return None, *(next(found) if wants else None for wants in wanted)
