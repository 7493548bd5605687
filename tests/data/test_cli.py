"""Which errors are a person's, what is said about them, and that nobody has to listen."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
from data_helpers import environment
from support import ROOT

from data import cli
from data.cli import NotFound, Progress, UserError, as_user_error, exit_code, sentence


def failing(error: BaseException) -> tuple[int, str]:
    def main() -> None:
        raise error

    return exit_code(main), ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--seed must be\n0 or more"), 2, "error: --seed must be 0 or more\n"),
        (NotFound("no shards at x"), 2, "error: no shards at x\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/somewhere/x"), 2, "error: /somewhere/x: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", b"/some/\xff"), 2, "error: /some/\\udcff: Permission denied\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a\n\x1b[31merror: \x85b"),
            2,
            "error: a\\n\\x1b[31merror: \\x85b: No such",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; make room and"),
        (OSError(errno.EMFILE, "Too many open files", "x"), 2, "ulimit -n"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), 1, "Traceback"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "Traceback"),
        (OSError("a library's own words"), 1, "Traceback"),
        (ValueError("bad"), 1, "Traceback"),
        (KeyError("weights"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_every_error_is_a_sentence_or_a_traceback(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error)[0] == code
    err = capsys.readouterr().err
    assert said in err and ("Traceback" in err) == (code == 1) and (code == 1 or err.count("\n") == 1)


def test_a_missing_file_of_python_s_own_is_no_user_s_mistake() -> None:
    inside = os.path.join(sysconfig.get_path("purelib"), "torch", "gone.so")
    for path, user in ((inside, False), ("/proc/self/gone", False), ("/data/gone", True), ("gone", True)):
        error = FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        assert (as_user_error(error) is not None) == user, path


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_TRACEBACK", "1")
    assert failing(UserError("what"))[0] == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("error: what\n")


def test_a_rename_names_both_files() -> None:
    assert sentence(OSError(errno.EACCES, "Permission denied", "a", None, "b")) == "a -> b: Permission denied"


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    """`--output runs/first` where that leads to a disk that is not mounted: "File exists", and nothing to be seen there."""
    link = tmp_path / "first"
    link.symlink_to("/mnt/gone")
    with pytest.raises(FileExistsError) as caught:
        link.mkdir(exist_ok=True)
    assert sentence(caught.value) == (
        f"{link}: File exists as a link to /mnt/gone, which is not there; make that, or remove the link"
    )


def test_not_found_is_what_callers_of_python_expect() -> None:
    with pytest.raises(FileNotFoundError, match="no x"):
        raise NotFound("no x")


#: Says more than a pipe holds, then writes a file and ends.
CHATTY = """
import sys
from pathlib import Path
from data.cli import Progress, leave, say, stdout
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
                cli.write_out("text")


def test_text_that_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    code = "from data.cli import say, stdout, leave\nsay('caf\\u00e9 \\udcff', stdout)\nleave(0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, env={**environment(), "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and done.stdout == b"caf\\xe9 \\udcff\n"


def test_so_is_what_a_command_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer with a code point that PYTHONIOENCODING leaves out ended in a traceback."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    cli.write_out("caf\u00e9 \u2192")
    assert shown.getvalue() == b"caf\xe9 \\u2192\n"


@pytest.mark.parametrize("error", [UserError("no model at https:/me:S3CR@h"), RuntimeError("at https://h?token=S3CR")])
def test_no_secret_is_said(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither in a sentence nor in a traceback."""
    cli.report(error)
    cli.drain()
    said = capfd.readouterr().err
    assert "[redacted]" in said and "S3CR" not in said


def closed_streams() -> None:
    """For a process that is about to start: `<&- >&- 2>&-`."""
    os.closerange(0, 3)


COMMANDS = {
    "launch": "from launch.cli import run_command\nrun_command(lambda: tell())",
    "preprocess": "from data import preprocess\npreprocess.lead = lambda *_: tell()\npreprocess.main([])",
    "verify": "from data import verify\nverify.main([sys.argv[2]])\ntell()",
}
TELL = """
import os, subprocess, sys
def tell():
    with open(sys.argv[1], "w") as file:
        code = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)])"
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_standard_streams_are_taken_before_a_file_gets_their_numbers(
    command: str, tmp_path: Path, sound_shards: Path
) -> None:
    told = tmp_path / "told"
    line = [sys.executable, "-c", TELL + COMMANDS[command], str(told), str(sound_shards)]
    subprocess.run(line, cwd=ROOT, env=environment(), preexec_fn=closed_streams, timeout=60, check=True)
    assert told.read_text() == "['/dev/null', '/dev/null']\n"


def test_nothing_is_lost_where_somebody_listens(tmp_path: Path) -> None:
    code = "from data.cli import say, stdout, leave\nfor n in range(900): say(str(n), stdout)\nleave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 3 and done.stdout.split() == [str(n) for n in range(900)]


def test_a_process_may_fork_after_a_drain() -> None:
    cli.say("something")
    cli.drain()
    assert cli.stderr._thread is None


def test_quiet_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    progress = Progress(1_000_000, what="preprocess")
    for number in range(1, 11):
        now[0] += 2.0
        progress.update(progress.done + 100_000, f"{50 * number} documents")
    cli.drain()
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
from data.cli import drain, report
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
