"""Curves side by side as SVG, by hand, as `bars.py` draws its bars."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from launch.benchmarks.bars import COLORS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 330, 56, 44, 46


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points `(x, least, mean, greatest)`: a line through the means, a band between the others."""

    name: str
    points: list[tuple[float, float, float, float]]


def draw(path: Path, panels: dict[str, list[Curve]], title: str, *, unit: str) -> None:
    """Panels `{what x is: curves}` in a row, over the same `unit` of y; x is logarithmic."""
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    body = ['<rect width="100%" height="100%" fill="white"/>', _text(10, 20, title, size=15)]  # a page may be dark
    for number, (label, curves) in enumerate(panels.items()):
        body += [f'<g transform="translate({number * WIDTH} 0)">', *_panel(label, curves, colors, unit), "</g>"]
    for number, name in enumerate(names):
        x, y = LEFT + number % 5 * 170, HEIGHT + 16 + number // 5 * 20
        body.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colors[name]}"/>' + _text(x + 18, y, name))
    height, width = HEIGHT + 24 + (len(names) + 4) // 5 * 20, WIDTH * len(panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n", encoding="utf-8")


def _panel(label: str, curves: list[Curve], colors: dict[str, str], unit: str) -> list[str]:
    points = [point for curve in curves for point in curve.points]
    if not points:
        return []
    left, right = math.log(min(p[0] for p in points)), math.log(max(p[0] for p in points))
    low, high = min(p[1] for p in points), max(p[3] for p in points)

    def at(x: float, y: float) -> str:
        across = (math.log(x) - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        return f"{LEFT + across * (WIDTH - LEFT - 20):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    body = []
    for value in (low + (high - low) * part / 4 for part in range(5)):
        x, y = at(math.exp(left), value).split(",")
        end = at(math.exp(right), value).replace(",", " ")
        body.append(f'<path d="M {x} {y} L {end}" stroke="#ddd"/>' + _text(8, float(y) + 4, f"{value:.3f}"))
    for value in sorted({point[0] for point in max(curves, key=lambda curve: len(curve.points)).points}):
        x, _ = at(value, low).split(",")
        body.append(_text(float(x), HEIGHT - BOTTOM + 18, short(value), anchor="middle"))
    for curve in curves:
        there = [at(x, greatest) for x, _, _, greatest in curve.points]
        back = [at(x, least) for x, least, _, _ in reversed(curve.points)]
        middle = [at(x, mean) for x, _, mean, _ in curve.points]
        color = colors[curve.name]
        body.append(f'<polygon points="{" ".join(there + back)}" fill="{color}" opacity="0.18"/>')
        body.append(f'<polyline points="{" ".join(middle)}" fill="none" stroke="{color}" stroke-width="2"/>')
    return [*body, _text(LEFT, HEIGHT - 8, f"{unit} over {label}")]


def short(value: float) -> str:
    """`410k`, `1.64M`, `8.3T`: three digits at most, and what a thousand of them is called."""
    power = min(4, max(0, int(math.log10(value) // 3)))
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'G', 'T')[power]}"


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
