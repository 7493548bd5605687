"""What is said reaches whoever listens, and nobody has to."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from data_helpers import environment
from support import ROOT

from data import terminal
from data.cli import UserError
from data.terminal import Progress

#: Says more than a pipe holds, then writes a file and ends.
CHATTY = """
import sys
from pathlib import Path
from data.terminal import Progress, leave, say, stdout
for n in range(3000):
    say("x" * 100); say("y" * 100, stdout)
Path(sys.argv[1]).write_text("done")
leave(0)
"""


@pytest.mark.parametrize("sink", ["full pipe", "closed pipe", "full disk", "closed"])
def test_nobody_has_to_listen(sink: str, tmp_path: Path) -> None:
    """Each sink fails for real: the pipe is never read, its reader is gone, /dev/full refuses, the descriptor does not exist."""
    read, write = os.pipe()
    if sink == "full disk":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    if sink == "closed pipe":
        os.close(read)
    line = [sys.executable, "-c", CHATTY, str(tmp_path / "end")]
    shell = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *line] if sink == "closed" else line
    process = subprocess.Popen(shell, stdout=write, stderr=write, cwd=ROOT, env=environment())
    os.close(write)
    started = time.monotonic()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").read_text() == "done"
    if sink == "full pipe":
        assert len(os.read(read, 1 << 20)) >= 60_000  # it was full, so that a plain print would have hung
        assert time.monotonic() - started < 50
    if sink != "closed pipe":
        os.close(read)


def test_a_result_that_cannot_be_written_names_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk's error named no file, and the user looked for room on another disk. Who reads no more is told apart."""
    read, write = os.pipe()
    os.close(read)
    for path, kind in (("/dev/full", OSError), (write, BrokenPipeError)):
        with suppress(OSError), open(path, "w") as sink:  # which closing writes again
            monkeypatch.setattr(sys, "stdout", sink)
            with pytest.raises(kind, match="standard output"):
                terminal.write_out("text")


def test_text_that_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    code = "from data.terminal import say, stdout, leave\nsay('caf\\u00e9 \\udcff', stdout)\nleave(0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, env={**environment(), "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and done.stdout == b"caf\\xe9 \\udcff\n"


def test_so_is_what_a_command_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer with a code point that PYTHONIOENCODING leaves out ended in a traceback."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    terminal.write_out("caf\u00e9 \u2192")
    assert shown.getvalue() == b"caf\xe9 \\u2192\n"


@pytest.mark.parametrize("error", [UserError("no model at https:/me:S3CR@h"), RuntimeError("at https://h?token=S3CR")])
def test_no_secret_is_said(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither in a sentence nor in a traceback."""
    terminal.report(error)
    terminal.drain()
    said = capfd.readouterr().err
    assert "[redacted]" in said and "S3CR" not in said


def test_nothing_is_lost_where_somebody_listens(tmp_path: Path) -> None:
    code = "from data.terminal import say, stdout, leave\nfor n in range(900): say(str(n), stdout)\nleave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 3 and done.stdout.split() == [str(n) for n in range(900)]


def test_a_process_may_fork_after_a_drain() -> None:
    terminal.say("something")
    terminal.drain()
    assert terminal.stderr._thread is None


def test_quiet_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = Progress(1_000_000, what="preprocess")
    for number in range(1, 11):
        now[0] += 2.0
        progress.update(progress.done + 100_000, f"{50 * number} documents")
    terminal.drain()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "\r" not in "".join(lines)
    assert lines[0] == "preprocess: 150 documents, 0.1 MB/s, 30 %, 14 s to go"


def test_progress_counts_steps_too() -> None:
    progress = Progress(100, what="train", unit="step", done=40)
    progress.start -= 10
    progress.done = 60
    assert progress.line("loss 3.2") == "train: loss 3.2, 2.00 step/s, 60 %, 20 s to go"


WITHOUT_ROOM = """
import resource, threading
from pathlib import Path
from data.terminal import drain, report
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**21, mapped + 2**21))  # less than a thread's stack
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    code = report(error)
    drain()
    raise SystemExit(code)
"""


def test_what_is_said_needs_no_thread() -> None:
    """Where the address space is used up (a container's limits, `ulimit -v`) no thread starts, and the sentence is still said."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    said = "error: not enough memory or threads for this process: can't start new thread; give it less to do"
    assert done.returncode == 2 and done.stderr.startswith(said), done.stderr
