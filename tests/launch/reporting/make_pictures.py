"""The pictures in launch/reporting/pictures/: the top of the page of each RUN that is named.

Run with `PYTHONPATH=.:tests/launch`, where Debian's chromium and chromium-driver are installed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chromium import start_browser

from launch.reporting.page import build_page
from launch.reporting.read import read_run

PICTURES = Path(__file__).parents[3] / "launch" / "reporting" / "pictures"
WIDTH, HEIGHT = 1180, 900


def main(folders: list[Path]) -> None:
    PICTURES.mkdir(exist_ok=True)
    with start_browser() as browser, tempfile.TemporaryDirectory() as scratch:
        browser.size(WIDTH, HEIGHT)
        for folder in folders:
            run = read_run(folder)
            page = Path(scratch) / f"{run.name}.html"
            page.write_text(build_page([run], {}), encoding="utf-8")
            browser.open(page)
            browser.picture(PICTURES / f"{run.name}.png")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
