"""Stacked horizontal bars as SVG."""

from __future__ import annotations

from pathlib import Path

from launch.benchmarks import svg

WIDTH, LEFT, BAR, GAP = 900, 190, 30, 16
LEAST = 34  # width of a part whose number fits into it


def draw(path: Path, bars: dict[str, dict[str, float]], title: str) -> None:
    """`{bar: {part: seconds}}`; every part has one color, and its milliseconds stand in it where they fit."""
    parts = sorted({part for bar in bars.values() for part in bar}, key=lambda part: -max(b.get(part, 0) for b in bars.values()))
    scale = (WIDTH - LEFT - 90) / max(sum(bar.values()) for bar in bars.values())
    body = [svg.words(10, 22, title, size=15)]
    y = 44.0
    for name, bar in bars.items():
        body += [svg.words(10, y + 20, name), *_bar(bar, parts, scale, y)]
        y += BAR + GAP
    below, bottom = svg.legend(parts, 10, y + 14, WIDTH - 20)
    svg.write(path, body + below, WIDTH, bottom)


def _bar(bar: dict[str, float], parts: list[str], scale: float, y: float) -> list[str]:
    x, body = float(LEFT), []
    for number, part in enumerate(parts):
        width = bar.get(part, 0) * scale
        body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" {svg.paint(number)}/>')
        if width > LEAST:
            body.append(svg.words(x + 4, y + 20, f"{1e3 * bar[part]:.0f}", fill="white"))
        x += width
    return [*body, svg.words(x + 6, y + 20, f"{1e3 * sum(bar.values()):.0f} ms")]
