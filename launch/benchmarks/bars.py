"""Stacked horizontal bars as SVG, by hand: no plotting package is needed to read one."""

from __future__ import annotations

from html import escape
from pathlib import Path

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
WIDTH, LEFT, BAR, GAP = 900, 190, 30, 16


def draw(path: Path, bars: dict[str, dict[str, float]], title: str) -> None:
    """`{bar: {part: seconds}}`; every part has one color, and its milliseconds stand in it where they fit."""
    parts = sorted({part for bar in bars.values() for part in bar}, key=lambda part: -max(b.get(part, 0) for b in bars.values()))
    scale = (WIDTH - LEFT - 90) / max(sum(bar.values()) for bar in bars.values())
    body = [_text(10, 22, title, size=15)]
    y = 44.0
    for name, bar in bars.items():
        x = float(LEFT)
        body.append(_text(10, y + 20, name))
        for part in parts:
            width = bar.get(part, 0) * scale
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLORS[parts.index(part) % 10]}"/>')
            if width > 34:
                body.append(_text(x + 4, y + 20, f"{1e3 * bar[part]:.0f}", fill="white"))
            x += width
        body.append(_text(x + 6, y + 20, f"{1e3 * sum(bar.values()):.0f} ms"))
        y += BAR + GAP
    for index, part in enumerate(parts):
        x = 10 + index % 4 * 220
        row = y + 14 + index // 4 * 22
        body.append(f'<rect x="{x}" y="{row - 11}" width="12" height="12" fill="{COLORS[index % 10]}"/>' + _text(x + 18, row, part))
    height = y + 30 + (len(parts) + 3) // 4 * 22
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="13">'
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n", encoding="utf-8")


def _text(x: float, y: float, text: str, *, size: int = 13, fill: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
