"""Values of JSON by their dotted keys: settings, configurations, what has changed of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lookup(config: dict[str, Any], dotted: str, default: Any = None) -> Any:
    """`lookup(config, "zero_optimization.stage")`; `default` where a part of the path is missing."""
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def leaves(value: Any, dotted: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested objects that is no object, or an empty one."""
    if not isinstance(value, dict) or not value:
        yield dotted, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{dotted}.{key}" if dotted else str(key))


def differing(old: Any, new: Any, dotted: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) where two values of JSON differ, by key; None stands for what is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differing(old.get(key), new.get(key), f"{dotted}.{key}" if dotted else str(key))
    elif old != new:
        yield dotted, old, new
