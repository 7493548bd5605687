"""The interactive prompt: one text after another, with a line editor and a history that outlives the session."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data.cli import UserError
from data.terminal import say

GREETING = "Text to continue; a line that ends with \\ goes on in the next. Ctrl-C stops an answer, Ctrl-D ends."
HISTORY_LINES = 1000


def history_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "moe-code-gpt" / "generate_history"


@contextlib.contextmanager
def line_editor(path: Path) -> Iterator[None]:
    """Arrow keys and history for `input`. Where there is no readline, or no home to write to, there is simply none."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def ask_here(prompt: str) -> str:
    """`input`, whose prompt is none of the answers where these go to a file or a program."""
    if sys.stdout.isatty():
        return input(prompt)  # by the line editor
    tell(prompt, end="")
    return input()


def tell(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def prompts(ask: Callable[[str], str]) -> Iterator[str]:
    """What is typed, until the end of input; an empty line, Ctrl-C or bytes that are no text ask again."""
    while True:
        try:
            text = ask("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + ask("... ")
        except EOFError:
            return
        except KeyboardInterrupt:
            tell("")
            continue
        except UnicodeDecodeError as error:
            tell(f"error: that is no {error.encoding.upper()} text: it has a byte {error.object[error.start]:#04x}")
            continue
        if text:
            yield text


def converse(answer: Callable[[str], None], ask: Callable[[str], str] = ask_here) -> None:
    """Answer each prompt; Ctrl-C ends an answer and not the session, a mistake is said and not the end."""
    tell(GREETING)
    for text in prompts(ask):
        try:
            answer(text)
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except UserError as error:
            say(f"error: {error}")
