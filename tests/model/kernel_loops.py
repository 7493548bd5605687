"""How often a kernel's loop goes round, and what is noticed of one that stops after its first trip.

Under Triton's interpreter, which runs a kernel as Python: its `range` is looked up in the kernel's module.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterable
from operator import index
from types import ModuleType
from typing import Any


def loops_of(module: ModuleType) -> dict[tuple[str, int], str]:
    """The loops in a module's kernels, by function and line: a name for each. Those that are unrolled are none."""
    found = {}
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef) and any(map(_is_jit, function.decorator_list)):
            loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While) and not _is_static(node)]
            for number, loop in enumerate(sorted(loops, key=lambda node: node.lineno)):
                found[function.name, loop.lineno] = f"{function.name}, loop {number + 1}"
    return found


def _is_jit(node: ast.expr) -> bool:
    return ast.unparse(node).split("(")[0] == "triton.jit"


def _is_static(node: ast.For | ast.While) -> bool:
    return isinstance(node, ast.For) and ast.unparse(node.iter).startswith("tl.static_range(")


class Loops:
    """The loops of some modules, watched from now on. `trips` has, of each that went round with a short last trip, how often."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        self.names: dict[tuple[str, int], str] = {}
        self.trips: dict[str, int] = {}
        self.entered: set[str] = set()
        self.cut = ""
        for module in modules:
            self.names |= loops_of(module)
            module.range = self._range  # type: ignore[attr-defined]

    def _range(self, *bounds: Any) -> builtins.range:
        frame = sys._getframe(1)
        name = self.names.get((frame.f_code.co_name, frame.f_lineno))
        whole = builtins.range(*map(index, bounds))
        if name is None:  # the host's
            return whole
        if len(whole) > 1:
            self.entered.add(name)
        if (whole.stop - whole.start) % whole.step:
            self.trips[name] = max(self.trips.get(name, 0), len(whole))
        return whole[:1] if name == self.cut else whole
