"""What a run says about itself: a progress bar or plain lines, `metrics.jsonl`, and trackers such as W&B.

`metrics.jsonl` is the record. Every sink may fail (a full disk, a terminal that is closed or on hold, a tracker down, slow or
without a key): training neither stops nor waits for it. Only rank 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.files import finite, is_open_at, replace_file
from data.terminal import PLAIN_SECONDS, say, stderr
from launch.run.progress import coloured, progress_line
from launch.run.trackers import Tracked, Tracker, start_trackers
from launch.words import brief_duration, step_of_last

METRICS, SUPERSEDED = "metrics.jsonl", "metrics.superseded.jsonl"


class JsonLines:
    """Append-only JSON Lines that hold whole lines whatever happens, written through at every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_partial_line()

    def _cut_partial_line(self) -> None:
        """A killed process or a full disk can leave half a line at the end; the next line must not join it."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, min(size, 1 << 16), max(0, size - (1 << 16)))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(self._file, size - (len(tail) - (tail.rfind(b"\n") + 1)))

    def write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(finite(row)) + "\n").encode()
        try:
            self._open_anew_if_gone()
            try:
                while line:
                    line = line[os.write(self._file, line) :]  # which may legally write less than it was given
            except OSError:
                self._cut_partial_line()
                raise
            self.failed = False
        except OSError as error:
            if not self.failed:  # once an outage, not once a line
                say(f"warning: {self.path}: {error.strerror or error}; training goes on without this log")
            self.failed = True

    def _open_anew_if_gone(self) -> None:
        """The file was deleted or moved away: what is written to it now, nobody would find."""
        if not is_open_at(self._file, self.path):
            gone = self._file
            self._open()
            os.close(gone)

    def go_on_from(self, step: int, samples: int) -> None:
        """The rows of steps after this one will be written again: they move to `metrics.superseded.jsonl`.

        A row belongs to what was before if its samples do: after a rollback the steps of a run begin again, its samples do not.
        """
        kept: list[bytes] = []
        superseded: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            (kept if _is_before(line, step, samples) else superseded).append(line)
        if superseded:
            with open(self.path.with_name(SUPERSEDED), "ab") as file:
                file.writelines(superseded)
            replace_file(self.path, b"".join(kept))
            self._open_anew_if_gone()

    def close(self) -> None:
        os.close(self._file)


def _is_before(line: bytes, step: int, samples: int) -> bool:
    try:
        row = json.loads(line)
        if step == samples == 0:
            return not {"step", "samples"} & row.keys()  # a run that begins anew evaluates at step 0 again as well
        return bool(row["samples"] <= samples if "samples" in row else row["step"] <= step)
    except (ValueError, TypeError, KeyError, AttributeError):
        return True  # not ours to judge


class Monitor:
    """Progress and metrics of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, folder: Path, *, enabled: bool, last_step: int) -> None:
        self.enabled = enabled
        self._begin, self._first, self._last, self._last_line = time.monotonic(), 0, last_step, 0.0
        self._bar: tqdm[Any] | None = None
        self._trackers: list[Tracker] = []
        if enabled:
            self._lines = JsonLines(folder / METRICS)

    def begin(self, step: int, samples: int = 0) -> None:
        """Training starts at `step`: from here on there is a bar."""
        self.count_from(step)
        if not self.enabled:
            return
        with contextlib.suppress(OSError):  # a full disk: the rows stand twice
            self._lines.go_on_from(step, samples)
        if stderr.isatty():
            # Wider than any terminal: the line is cut to the width here, and some terminals say that theirs is 0.
            self._bar = tqdm(total=self._last, initial=step, ncols=1000, mininterval=0.5, file=stderr, bar_format="{desc}")

    def count_from(self, step: int) -> None:
        """What is left is estimated by the steps after this one: after a rollback those before it say nothing of it."""
        self._begin, self._first = time.monotonic(), step

    def start_trackers(self, names: Sequence[str], run: Tracked, *, detailed: bool = False) -> None:
        if self.enabled:
            self._trackers = start_trackers(names, run, detailed=detailed)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.enabled:
            say(text)

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics, with the time (seconds since 1970): to `metrics.jsonl` and the trackers."""
        if self.enabled:
            row = finite({**row, "time": round(time.time(), 3)})
            self._lines.write(row)
            for tracker in self._trackers:
                tracker.write(row)

    def progress(self, step: int, shown: dict[str, str], *, force: bool = False) -> None:
        """Show the line of `step`; without a terminal, a plain one every few seconds. `shown`: texts by name."""
        if not self.enabled:
            return
        now = time.monotonic()
        left = brief_duration((now - self._begin) / max(1, step - self._first) * (self._last - step))
        if self._bar is not None:
            width = shutil.get_terminal_size().columns - 1
            line = progress_line(step_of_last(step, self._last), shown, left, width)
            self._bar.set_description_str(coloured(line), refresh=False)
            self._bar.update(step - self._bar.n)
        elif force or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            say(f"step {step}/{self._last}  {'  '.join(shown.values())}  ETA {left}")

    def close(self) -> bool:
        """Close the sinks. False where a tracker hangs: its own clean-up at the interpreter's exit would wait for minutes."""
        if not self.enabled:
            return True
        if self._bar is not None:
            self._bar.close()
        self._lines.close()
        hanging = [tracker.title for tracker in self._trackers if not tracker.close()]
        for title in hanging:
            say(f"warning: {title} does not answer and is left behind; metrics.jsonl has everything")
        return not hanging
