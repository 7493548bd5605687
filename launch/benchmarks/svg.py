"""Charts as SVG, by hand: no plotting package is needed to read one."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from data.files import replace_file

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
#: Around what has a color: none for the first ten, others for the next tens, which have the same colors.
OUTLINES = ("", ' stroke="black"', ' stroke="black" stroke-dasharray="2 2"')
LETTER = 7.0  # width of one on average, at the size of a chart's text
MOST_LETTERS = 40  # of a name in a legend


def svg_path(text: str) -> Path:
    """For argparse."""
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg, which is what is drawn")
    return Path(text)


def words(x: float, y: float, text: str, *, size: int = 12, fill: str = "black", anchor: str = "start", hint: str = "") -> str:
    """`hint`: what a browser shows where the pointer rests on it."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{title}{escape(text)}</text>'


def legend(names: list[str], left: float, top: float, width: float) -> tuple[list[str], float]:
    """A square of each one's paint and its name, in rows of at most `width`; and where the next thing below may stand."""
    step = min(max(len(name) for name in names), MOST_LETTERS) * LETTER + 40
    in_a_row = max(1, int(width // step))
    body = []
    for number, name in enumerate(names):
        x, y = left + number % in_a_row * step, top + number // in_a_row * 20
        body.append(f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" {paint(number)}/>')
        body.append(words(x + 18, y, elided(name), hint=name if len(name) > MOST_LETTERS else ""))
    return body, top + (len(names) - 1) // in_a_row * 20 + 20


def elided(name: str) -> str:
    """Its two ends, where it is longer than `MOST_LETTERS`: names that are made in a row differ in one of them."""
    half = MOST_LETTERS // 2
    return name if len(name) <= MOST_LETTERS else f"{name[: half - 1]}…{name[-half:]}"


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def paint(number: int) -> str:
    """Color and outline, by which thirty can be told apart."""
    return f'fill="{color(number)}"{OUTLINES[number // len(COLORS) % len(OUTLINES)]}'


def write(path: Path, body: list[str], width: float, height: float) -> None:
    """White below: the page around it may be dark."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif">'
    text = "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"])
    replace_file(path, f"{text}\n".encode())
