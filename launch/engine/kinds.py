"""What stands in the DeepSpeed JSON, and what should: in the words of the refusals. Needs no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

WHOLE, NUMBER, SWITCH, TEXT, OBJECT = "a whole number", "a number", "true or false", "a string", "an object"
_TYPES: dict[str, Any] = {WHOLE: int, NUMBER: (int, float), SWITCH: bool, TEXT: str, OBJECT: dict}


def is_kind(value: Any, kind: str) -> bool:
    """bool is an int in Python, and `"stage": true` is a mistake."""
    return isinstance(value, _TYPES[kind]) and (kind == SWITCH or not isinstance(value, bool))


def another_kind(value: Any, default: Any) -> str:
    """What the value must be, in words, where it is of another kind than the default; empty where it is not, or none can tell.

    A default of 0 may stand for 0.0: any number is of its kind. One of "auto" says nothing of what else is right.
    """
    if default == "auto":
        return ""
    if isinstance(default, tuple):
        is_like = isinstance(value, list) and len(value) == len(default) and all(is_kind(each, NUMBER) for each in value)
        return "" if is_like else f"a list of {len(default)} numbers"
    kind = next((kind for kind in (SWITCH, NUMBER, TEXT) if is_kind(default, kind)), "")
    return "" if not kind or is_kind(value, kind) else kind


def shown(value: Any) -> str:
    """As the file has it, cut."""
    return json.dumps(value)[:60]


def unknown(section: str, key: str, known: Iterable[str]) -> str:
    """`known`: what is read in that section, or in any of several optimizers."""
    whole = f"{section}.{key}" if section else key
    return f'unknown key "{whole}", which neither DeepSpeed nor this system reads{hint(key, set(known) - {key})}'


def hint(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """What was meant, perhaps, whatever its case; empty where nothing is near."""
    by_lower = {each.lower(): each for each in sorted(known)}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f'; did you mean "{by_lower[nearest[0]]}"?' if nearest else ""
