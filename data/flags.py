"""How every command reads its flags and lays out its help; `launch/` uses it too.

Help begins with what one came for, the examples; then the flags that must be given, then the groups. A default is named where it
says something: not where it is none, off, or in the text already.
"""

from __future__ import annotations

import argparse
import difflib
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from data.cli import UserError

T = TypeVar("T")
WIDTH = 100  # at most, on wide terminals


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Text as it was written, and `(default: ...)` where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(WIDTH, shutil.get_terminal_size().columns) - 2)

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        silent = nothing or not action.option_strings or action.required
        if silent or "default" in said:
            return said
        return said + (" (default: %(default)s)" if said else "default: %(default)s")


class Parser(argparse.ArgumentParser):
    """`examples`: command lines, one a line. A wrong flag is a user's mistake like any other, one sentence; no abbreviations."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.examples = examples.strip().splitlines()
        self.given: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """argparse looks for what must be given first, and would call a misspelt `--input` missing."""
        flag, meant = self._misspelt()
        if meant and "required" in message:
            message = f"unrecognized arguments: {flag}"
        if meant and message.startswith("unrecognized arguments"):
            raise UserError(f"{message}; did you mean {meant}? --help lists the flags")
        raise UserError(f"{message}; --help lists the flags")

    def _misspelt(self) -> tuple[str, str]:
        """The first given flag that is none but nearly one, and that one; else empty."""
        known = [name for name, action in self._option_string_actions.items() if action.help is not argparse.SUPPRESS]
        for flag in (word.partition("=")[0] for word in self.given if word.startswith("--")):
            nearest = difflib.get_close_matches(flag, known, 1, 0.75)
            if nearest and flag not in self._option_string_actions:
                return flag, nearest[0]
        return "", ""

    def format_help(self) -> str:
        """What it does, examples, a usage of one line, and the groups."""
        own = self._get_formatter()
        own.add_text(self.description)
        if self.examples:
            own.add_text("\n".join(["examples:", *(f"  {line.strip()}" for line in self.examples)]))
        own.add_text(f"usage: {self.usage or self.short_usage()}")
        for group in self._in_order():
            own.start_section(group.title)
            own.add_text(group.description)
            own.add_arguments(group._group_actions)
            own.end_section()
        own.add_text(self.epilog)
        return own.format_help()

    def _in_order(self) -> list[argparse._ArgumentGroup]:
        """The unnamed groups first, unless `--help` is all that they show."""

        def has_only_help(group: argparse._ArgumentGroup) -> bool:
            shown = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
            return [type(action) for action in shown] == [argparse._HelpAction]

        return sorted(self._action_groups, key=has_only_help)

    def short_usage(self) -> str:
        """The program, what must be given, and `[options]` for all the rest."""
        alternatives = [self._choice(group) for group in self._mutually_exclusive_groups if group.required]
        needed = [_spelled(action) for action in self._actions if action.required and action.option_strings]
        positional = [_spelled(action) for action in self._actions if not action.option_strings]
        return " ".join([self.prog, *needed, *alternatives, *positional, "[options]"])

    @staticmethod
    def _choice(group: argparse._MutuallyExclusiveGroup) -> str:
        return "(" + " | ".join(_spelled(action) for action in group._group_actions) + ")"


def at_least_one(flags: object, *names: str) -> None:
    """Raises UserError for the first of these flags that is given and below 1, or of whose several values one is."""
    for name in names:
        given = getattr(flags, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")


def not_negative(flags: object, *names: str) -> None:
    """Raises UserError for the first of these flags that is below 0, or no finite number of anything."""
    for name in names:
        if not 0 <= getattr(flags, name) < math.inf:
            raise UserError(f"--{name} must be 0 or a number above it, not {getattr(flags, name)}")


def as_dataclass(arguments: type[T], found: argparse.Namespace) -> T:
    """What was parsed, as one frozen object: the fields that it has, and lists as tuples."""
    values = {field.name: getattr(found, field.name) for field in fields(arguments)}  # type: ignore[arg-type]
    return arguments(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _spelled(action: argparse.Action) -> str:
    """`--flag VALUE`, with `...` where several may follow."""
    name = action.option_strings[-1] if action.option_strings else ""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    several = "..." if action.nargs in ("+", "*") else ""
    shown = "" if action.nargs == 0 else f"{value if isinstance(value, str) else value[0]}{several}"
    return f"{name} {shown}".strip()
