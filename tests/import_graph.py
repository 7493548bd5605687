"""The imports of our packages as a graph, read off the source with `ast`: those inside functions and for types count as well."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from support import ROOT

Graph = dict[str, set[str]]


def module_graph(package: str) -> Graph:
    """Module -> modules of the same package that it imports, wherever in the file the import stands."""
    modules = {_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}
    return {name: _imports(name, path, modules) - {name} for name, path in modules.items()}


def room_graph(package: str) -> Graph:
    """The same between rooms: a room is a module directly in the package, or a sub-package with all that is in it."""
    rooms: Graph = {}
    for name, imported in module_graph(package).items():
        if name != package:
            rooms.setdefault(_room(name), set()).update(_room(other) for other in imported if other != package)
    return {room: others - {room} for room, others in rooms.items()}


def inside(graph: Graph, room: str) -> Graph:
    """The part of a module graph that lies in one sub-package."""
    names = {name for name in graph if name.startswith(f"{room}.")}
    return {name: graph[name] & names for name in names}


def circle(graph: Graph) -> list[str]:
    """One circle of imports, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain of imports: its length is the number of floors. Raises ValueError for a graph with a circle."""
    if round_trip := circle(graph):
        raise ValueError(f"no floors in a circle: {' -> '.join(round_trip)}")

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in sorted(graph[name])), key=len, default=()))

    return list(max((below(name) for name in sorted(graph)), key=len, default=()))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & set(modules)
            found.update(submodules or {base})
            if len(submodules) < len(node.names):
                found.add(base)
    return found & set(modules)
