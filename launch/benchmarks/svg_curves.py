"""Curves side by side as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from launch.benchmarks import svg
from launch.words import short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 330, 56, 20, 44, 46
BETWEEN = 44  # the least between two numbers on the x axis


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points `(x, least, mean, greatest)`: a line through the means, a band between the others.

    Curves of one name have one color, and marks with one outline. One that is computed and not measured is dashed and has no marks.
    """

    name: str
    points: list[tuple[float, float, float, float]]
    computed: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """From values to places in a panel; x is logarithmic."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def around(cls, curves: list[Curve]) -> Axes:
        points = [point for curve in curves for point in curve.points]
        across = [x for x, *_ in points]
        return cls(x=(min(across), max(across)), y=(min(low for _, low, _, _ in points), max(high for *_, high in points)))

    def across(self, x: float) -> float:
        low, high = self.x
        share = math.log(x / low) / math.log(high / low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        low, high = self.y
        share = (y - low) / (high - low) if high > low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: list[tuple[float, float]]) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)


def draw(path: Path, panels: dict[str, list[Curve]], title: str, *, unit: str) -> None:
    """Panels `{what x is: curves}` in a row, over the same `unit` of y. A curve without points has its name in the legend alone."""
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    body = [svg.words(10, 20, title, size=15)]
    for number, (label, curves) in enumerate(panels.items()):
        body += [f'<g transform="translate({number * WIDTH} 0)">', *_panel(label, curves, names, unit), "</g>"]
    width = WIDTH * len(panels)
    below, bottom = svg.legend(names, LEFT, HEIGHT + 16, width - LEFT)
    svg.write(path, body + below, width, bottom)


def _panel(label: str, curves: list[Curve], names: list[str], unit: str) -> list[str]:
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return []
    axes = Axes.around(drawn)
    lines = [line for curve in drawn for line in _curve(curve, axes, names.index(curve.name))]
    measured = [curve for curve in drawn if not curve.computed]
    return [*_grid(axes), *_ticks(axes, measured), *lines, svg.words(LEFT, HEIGHT - 8, f"{unit} over {label}")]


def _grid(axes: Axes) -> list[str]:
    low, high = axes.y
    body = []
    for value in (low + (high - low) * part / 4 for part in range(5 if high > low else 1)):
        y = axes.down(value)
        body.append(f'<path d="M {LEFT} {y:.1f} L {WIDTH - RIGHT} {y:.1f}" stroke="#ddd"/>' + svg.words(8, y + 4, f"{value:.3f}"))
    return body


def _ticks(axes: Axes, curves: list[Curve]) -> list[str]:
    """Where the longest curve was measured, from the right as far as the numbers have room."""
    body, taken = [], math.inf
    for value in sorted((x for x, *_ in max(curves, key=lambda curve: len(curve.points)).points), reverse=True):
        x = axes.across(value)
        if x <= taken - BETWEEN:
            body.append(svg.words(x, HEIGHT - BOTTOM + 18, short(value), anchor="middle"))
            taken = x
    return body


def _curve(curve: Curve, axes: Axes, number: int) -> list[str]:
    color = svg.color(number)
    band = [(x, high) for x, _, _, high in curve.points] + [(x, low) for x, low, _, _ in reversed(curve.points)]
    means = [(x, mean) for x, _, mean, _ in curve.points]
    if curve.computed:
        return [f'<polyline points="{axes.path(means)}" fill="none" stroke="{color}" stroke-dasharray="5 4"/>']
    return [
        f'<polygon points="{axes.path(band)}" fill="{color}" opacity="0.18"/>',
        f'<polyline points="{axes.path(means)}" fill="none" stroke="{color}" stroke-width="2"/>',
        *(f'<circle cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="2.5" {svg.paint(number)}/>' for x, y in means),
    ]
