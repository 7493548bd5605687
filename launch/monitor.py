"""What a run says about itself: a progress bar or plain lines, `metrics.jsonl`, and W&B.

`metrics.jsonl` is the record. Every sink may fail (a full disk, W&B down, slow or without a key): training neither stops
nor waits for it. Only rank 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

PLAIN_SECONDS = 5.0  # between two lines where there is no terminal
CLOSE_SECONDS = 15.0  # that W&B gets at the end of a run; offline it takes one or two
SECRET = re.compile(r"(?i)((^|_)key|secret|passw(or)?d|credentials?|(^|(hf|hub|api|auth|access)_)token)$")
URL_USER = re.compile(r"(?<=://)[^/@\s]+@")


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: strings under a name that speaks of one, and users and passwords inside URLs."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name) for v in value]
    if isinstance(value, str):
        return "[redacted]" if SECRET.search(name) and value else URL_USER.sub("[redacted]@", value)
    return value


class JsonLines:
    """Append-only JSON Lines that hold whole lines whatever happens, written through at every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_partial_line()

    def _cut_partial_line(self) -> None:
        """A killed process or a full disk can leave half a line at the end; the next line must not join it."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, min(size, 1 << 16), max(0, size - (1 << 16)))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(self._file, size - (len(tail) - (tail.rfind(b"\n") + 1)))

    def write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        try:
            if os.write(self._file, line) != len(line):
                self._cut_partial_line()
                raise OSError("the line was written in part")
            self.failed = False
        except OSError as error:
            if not self.failed:  # once an outage, not once a line
                print(f"warning: {self.path}: {error}; training goes on without this log", file=sys.stderr, flush=True)
            self.failed = True

    def close(self) -> None:
        os.close(self._file)


class WandbSink:
    """W&B behind a thread and a bounded queue: what it cannot take in time is dropped, and its errors are said once."""

    def __init__(self, folder: Path, *, mode: str, project: str, run_id: str, config: dict[str, Any]) -> None:
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=1000)
        self._settings = dict(
            project=project, mode=mode, id=run_id, resume="allow", dir=str(folder), config=redact(config), name=folder.name
        )
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            run = wandb.init(**self._settings)
            while (row := self._rows.get()) is not None:
                run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            run.finish()
        except Exception as error:  # the one place where anything may go wrong without consequence
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"warning: W&B: {reason}; metrics.jsonl has everything", file=sys.stderr, flush=True)

    def write(self, row: dict[str, Any]) -> None:
        flat: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, list):
                flat.update({f"{key}/layer_{i}": v for i, v in enumerate(value)})
            else:
                flat[key] = value
        with contextlib.suppress(queue.Full):  # metrics.jsonl has the row
            self._rows.put_nowait(flat)

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Let W&B finish, for a limited time; False where it did not."""
        while True:
            try:
                self._rows.put_nowait(None)
                break
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._rows.get_nowait()
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Monitor:
    """Progress and metrics of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, folder: Path, *, enabled: bool, last_step: int) -> None:
        self.enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._begin, self._first, self._last, self._last_line = time.monotonic(), 0, last_step, 0.0
        self._bar: tqdm[Any] | None = None
        self._wandb: WandbSink | None = None
        if enabled:
            self._lines = JsonLines(folder / "metrics.jsonl")

    def begin(self, step: int) -> None:
        """Training starts at `step`: from here on there is a bar."""
        self._begin, self._first = time.monotonic(), step
        if self.enabled and self._terminal:
            self._bar = tqdm(total=self._last, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def start_wandb(self, folder: Path, *, mode: str, project: str, run_id: str, config: dict[str, Any]) -> None:
        if self.enabled and mode != "disabled":
            self._wandb = WandbSink(folder, mode=mode, project=project, run_id=run_id, config=config)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics: to `metrics.jsonl` and W&B."""
        if self.enabled:
            self._lines.write(row)
            if self._wandb is not None:
                self._wandb.write(row)

    def progress(self, step: int, shown: dict[str, str], *, force: bool = False) -> None:
        """Move the bar to `step`; without a terminal, a plain line every few seconds."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if force or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            eta = (now - self._begin) / max(1, step - self._first) * (self._last - step)
            values = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"step {step}/{self._last}  {values}  ETA {tqdm.format_interval(eta)}", file=sys.stderr, flush=True)

    def close(self) -> bool:
        """Close the sinks. False where W&B hangs: its own clean-up at the interpreter's exit would wait for minutes."""
        if not self.enabled:
            return True
        if self._bar is not None:
            self._bar.close()
        self._lines.close()
        if self._wandb is None or self._wandb.close():
            return True
        print("warning: W&B does not answer and is left behind; metrics.jsonl has everything", file=sys.stderr, flush=True)
        return False
