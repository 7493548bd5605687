"""One list of odd names through every command: each works, or is refused in one sentence before anything is read."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Site, last_saved, struck
from support import OLD

import data.preprocess
import data.verify
import launch.export
import launch.plan
import launch.report
from data.cli import UserError, as_user_error, sentence
from launch.run.arguments import parse_arguments

ODD = {
    "spaces": " a  b ",
    "quotes": "a'b\"c`d",
    "newline": "a\nb\tc",
    "dash": "-rf",
    "dollar": "$HOME;ls %s {x} ~",
    "combining": "e\u0301 \u0308 \u65e5\u672c",
    "pattern": "br[lr=1]*?",
    "no UTF-8": os.fsdecode(b"a\xffb"),
    "255": "n" * 255,
    "256": "n" * 256,
    "slash": "a/",
    "dots": "./code/../b",
    "link": "linked",
}
NOBODY = 65534
TOO_LONG, CLOSED = "File name too long", ("Permission denied", "may not be written to")
#: What is refused, and how; everything else works.
REFUSED = {
    **{(command, "256"): TOO_LONG for command in ("preprocess", "verify", "report", "plan", "train")},
    **{("export", kind): "the name is too long" for kind in ("255", "256")},
    ("export", "no UTF-8"): "names that are UTF-8",
    ("train", "pattern"): r"takes '\[' in a path for a pattern",
}


def preprocess(path: str) -> None:
    data.preprocess.work(["--input", "code", "--tokenizer", "tokenizer.json", f"--output={path}", "--workers", "1"])


def verify(path: str) -> None:
    assert data.verify.verify(Path(copy("tokens", path)), 1) == []  # whose error `main` says, to look at the next folder
    assert data.verify.main(["--", path]) == 0


def report(path: str) -> None:
    run(launch.report.main, "--", copy("run", path))


def plan(path: str) -> None:
    run(launch.plan.main, f"--from={copy('run', path)}")


def export(path: str) -> None:
    run(launch.export.main, f"--checkpoint={copy('run', 'a run')}", f"--output={path}")


def train(path: str) -> None:
    """As far as the flags; runs under odd names are below."""
    parse_arguments(["--data", "x", f"--output={path}"])


COMMANDS: list[Callable[[str], None]] = [preprocess, verify, report, plan, export, train]


def copy(name: str, path: str) -> str:
    """Something to read, under the odd name; a name that no folder can have stays as it is."""
    if not os.listdir(path) if os.path.isdir(path) else len(path) <= 255:
        shutil.copytree(OLD / name, path, dirs_exist_ok=True)
    return path


def run(main: Callable[[], int | None], *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *flags])
        patch.setattr("launch.export.make_quiet", lambda: None)  # it would silence the tests that follow
        assert not main()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with something to preprocess."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("def f(x):\n    return x\n" * 20)
    shutil.copy(OLD / "run/tokenizer/tokenizer.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_works_there_or_says_why_not(command: Callable[[str], None], kind: str, place: Path) -> None:
    if kind == "link":
        (place / "elsewhere").mkdir()
        (place / ODD[kind]).symlink_to("elsewhere")
    refusal = REFUSED.get((command.__name__, kind))
    struck(f"an odd path: {kind}")
    if refusal is None:
        command(ODD[kind])
        return
    before = sorted(place.iterdir())
    with pytest.raises((UserError, OSError), match=refusal) as raised:
        command(ODD[kind])
    assert as_user_error(raised.value) is not None
    assert [path for path in sorted(place.iterdir()) if path not in before] in ([], [place / "a run"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["not writable", "not readable"])
@pytest.mark.parametrize("command", COMMANDS[:5], ids=lambda command: command.__name__)
def test_another_users_folder_is_a_sentence(command: Callable[[str], None], mode: int, place: Path) -> None:
    """In a forked process that is nobody; the folders are root's."""
    for folder in (place, *place.parents):  # pytest's own among them
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    command("ours")  # imports what nobody could read where Python lies in root's home
    copy("run", "a run")
    theirs = place / "theirs"
    copy({"verify": "tokens"}.get(command.__name__, "run"), str(theirs)) if command not in (preprocess, export) else theirs.mkdir()
    theirs.chmod(mode)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            command(str(theirs))
            said = "worked"
        except BaseException as error:
            known = as_user_error(error)
            said = f"{type(error).__name__}: {error}" if known is None else f"error: {sentence(known)}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    struck("another user's folder")
    only_reads = command in (verify, plan) and mode == 0o755
    is_said = said.startswith("error: ") and any(words in said for words in CLOSED)
    assert said == "worked" if only_reads else is_said, said


def test_a_run_under_an_odd_name_trains_stops_and_goes_on(site: Site, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"-a b\n'e\xcc\x81 \xff %s $HOME;ls") / ("n" * 255)
    one = replace(site, ranks=1)
    assert "step_2" in one.finish(run, max_steps=4, stop_after=2).text()
    assert "step_2 (step 2" in one.finish(run, max_steps=4).text() and last_saved(run) == "step_4"
    struck("an odd path: a run")
