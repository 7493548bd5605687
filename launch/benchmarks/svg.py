"""Charts as SVG, by hand: no plotting package is needed to read one."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from data.files import replace_file

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
LETTER = 7.0  # width of one on average, at the size of a chart's text


def svg_path(text: str) -> Path:
    """For argparse."""
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg, which is what is drawn")
    return Path(text)


def words(x: float, y: float, text: str, *, size: int = 12, fill: str = "black", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'


def legend(names: list[str], left: float, top: float, width: float) -> tuple[list[str], float]:
    """A square of each one's color and its name, in rows of at most `width`; and where the next thing below may stand."""
    step = max(len(name) for name in names) * LETTER + 40
    in_a_row = max(1, int(width // step))
    body = []
    for number, name in enumerate(names):
        x, y = left + number % in_a_row * step, top + number // in_a_row * 20
        body.append(f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" fill="{color(number)}"/>' + words(x + 18, y, name))
    return body, top + (len(names) - 1) // in_a_row * 20 + 20


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def write(path: Path, body: list[str], width: float, height: float) -> None:
    """White below: the page around it may be dark."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif">'
    text = "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"])
    replace_file(path, f"{text}\n".encode())
