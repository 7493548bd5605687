"""Which errors are a person's, and what is said about them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from data_helpers import environment
from support import ROOT

from data.cli import NotFound, UserError, as_user_error, sentence
from data.terminal import exit_code


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
