"""One HTML page about one or more runs: curves, experts, red flags in words, settings. Nothing to install, nothing fetched.

python launch/report.py runs/first
python launch/report.py runs/first runs/second --output comparison.html
python launch/report.py runs/first --follow
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import UserError, printable
from data.files import check_replaceable, replace_file
from data.flags import Parser
from data.lock import FolderLock
from data.terminal import say, stdout
from launch.cli import run_command
from launch.reporting.evaluations import evaluations_of
from launch.reporting.page import build_page
from launch.reporting.read import Run, read_run
from launch.reporting.summary import goes_on, is_running

EXAMPLES = """
python launch/report.py runs/first
python launch/report.py runs/first runs/second --output comparison.html
python launch/report.py runs/first --follow
"""
SECONDS_MOST = 86_400
PAGE_BEGINS = b"<!doctype html>"


def build_parser() -> argparse.ArgumentParser:
    description = "One HTML page about one or more runs; it opens in any browser and needs no network."
    p = Parser(prog="python launch/report.py", description=description, examples=EXAMPLES)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that launch/train.py wrote (--output)")
    p.add_argument("--output", type=Path, metavar="F.html", help="file to write; default: report.html in the first run's folder")
    p.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="E.json", help="also show these results of launch/evaluate.py"
    )
    p.add_argument("--follow", action="store_true", help="rewrite the page until no run is going on; an open page reloads itself")
    p.add_argument("--seconds", type=float, default=30.0, metavar="S", help="seconds between pages with --follow")
    return p


def read_runs(folders: list[Path]) -> list[Run]:
    """With a name for each that no other has. Raises `UserError` for a folder that is no run's."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def write_report(arguments: argparse.Namespace, output: Path) -> list[Run]:
    """The page as it is now, put in place of the old one in one move."""
    runs = read_runs(arguments.runs)
    evaluations = evaluations_of(runs, arguments.evaluation)
    page = build_page(runs, evaluations, follow=arguments.seconds if arguments.follow else 0.0)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, printable(page).encode())
    return runs


def check_output(path: Path) -> None:
    """Raises `UserError` for what a page would destroy: a run's metrics, an evaluation, anything that is no page itself."""
    check_replaceable(path)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(PAGE_BEGINS)) != PAGE_BEGINS:
                raise UserError(f"--output {path} exists and is no page of launch/report.py; name another file")


def wait_for_rows(folders: list[Path]) -> None:
    """A run makes its folder, reads its data, builds its engine, and only then logs: until then there is nothing to show."""
    starting = [folder for folder in folders if _is_starting(folder)]
    for folder in starting:
        say(f"{folder} is starting and has logged nothing yet; waiting (Ctrl-C ends this)")
    while any(map(_is_starting, starting)):
        time.sleep(0.5)


def _is_starting(folder: Path) -> bool:
    lock = folder / FolderLock.NAME
    return not (folder / "metrics.jsonl").exists() and lock.exists() and is_running(folder, time.time() - lock.stat().st_mtime)


def main() -> int:
    arguments = build_parser().parse_args()
    output = arguments.output or arguments.runs[0] / "report.html"
    if not 1 <= arguments.seconds <= SECONDS_MOST:
        raise UserError(f"--seconds must be at least 1 and at most {SECONDS_MOST:,}, not {arguments.seconds:g}")
    if output.parent.is_dir():  # else it is made, if there is a run to report
        check_output(output)
    if arguments.follow:
        wait_for_rows(arguments.runs)
    runs = write_report(arguments, output)
    say(f"wrote {output} ({output.stat().st_size / 1000:,.0f} KB); open it in a browser", stdout)
    if arguments.follow:
        follow(arguments, output, runs)
    return 0


def follow(arguments: argparse.Namespace, output: Path, runs: list[Run]) -> None:
    """Until no run goes on, or Ctrl-C: either way the last page does not load itself any more."""
    try:
        while any(map(goes_on, runs)):
            time.sleep(arguments.seconds)
            runs = write_report(arguments, output)
    finally:
        arguments.follow = False
        write_report(arguments, output)


if __name__ == "__main__":
    run_command(main)
