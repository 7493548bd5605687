"""The interactive prompt: lines that go on, Ctrl-C, mistakes, the end, and a history on disk."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.cli import UserError
from data.terminal import drain
from launch.generation.interactive import GREETING, converse, history_file, line_editor

NO_TEXT = UnicodeDecodeError("utf-8", b"x\xff", 1, 2, "invalid start byte")


def typing(*lines: str | type[BaseException] | BaseException) -> Callable[[str], str]:
    rest = iter(lines)

    def ask(_: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask


def test_each_prompt_is_answered_until_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def answer(text: str) -> None:
        asked.append(text)
        if text == "long":
            raise KeyboardInterrupt
        if text == "wrong":
            raise UserError("too many tokens")

    converse(answer, typing("one", "", "def f():\\", "    return", KeyboardInterrupt, "long", NO_TEXT, "wrong", "last"))
    drain()
    assert asked == ["one", "def f():\n    return", "long", "wrong", "last"]
    said = capsys.readouterr()
    assert "(stopped)" in said.err and "error: too many tokens" in said.err
    assert "error: that is no UTF-8 text: it has a byte 0xff" in said.err


def test_all_but_the_answers_is_on_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate.py --json > answers.jsonl` at a terminal had the greeting and its prompts in the file."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\\\nlines\n"))

    def answer(text: str) -> None:
        print(json.dumps(text))
        raise KeyboardInterrupt

    converse(answer)
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == ["one", "two\nlines"]
    assert said.err.startswith(GREETING + "\n> ") and "... " in said.err


def test_history_is_kept_between_sessions(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    readline.clear_history()
    path = tmp_path / "state" / "history"
    with line_editor(path):
        readline.add_history("def f():")
    readline.clear_history()
    with line_editor(path):
        assert readline.get_history_item(1) == "def f():"
    readline.clear_history()


def test_no_home_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with line_editor(tmp_path / "file" / "below" / "history"):
        pass


def test_history_lies_where_states_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "moe-code-gpt" / "generate_history"
