"""Every link of every README to a file or a heading leads somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from readme_commands import FENCE
from support import ROOT

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [ROOT / name for name in listed.split()] or sorted(ROOT.glob("**/README.md"))


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: in small letters, without punctuation, spaces as hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(name for name in [slug, *(f"{slug}-{n}" for n in range(1, 99))] if name not in found))
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken
