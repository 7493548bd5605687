"""The one line that a person watches: as much of it as the terminal's width takes, the most important first to stay."""

from __future__ import annotations

import os

#: What goes first where the line is too long; the step, the loss and the time left always stay.
DISPENSABLE = ("memory", "lr", "MFU", "norm", "max_vio", "tokens/s")


def progress_line(done: str, values: dict[str, str], left: str, width: int) -> str:
    """`done` such as `12/400`, `values` by name as they are shown, `left` the time left."""
    shown = dict(values)
    for name in (None, *DISPENSABLE):
        shown.pop(name or "", None)
        line = "  ".join([done, *shown.values(), f"ETA {left}"])
        if len(line) > width:
            line = line.replace("  ", " ")
        if len(line) <= width:
            break
    return line[:width]


def coloured(line: str) -> str:
    """The count in bold and the rest as it is; not where NO_COLOR is set (no-color.org) or the terminal is dumb."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return line
    done, space, rest = line.partition(" ")
    return f"\033[1m{done}\033[0m{space}{rest}"
