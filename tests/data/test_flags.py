"""The parser that every command has: what its help shows, and what a wrong flag says."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from data.cli import UserError
from data.flags import Parser, as_dataclass, at_least_one, not_negative

HELP = "--help lists the flags"


@pytest.fixture
def parser() -> Parser:
    p = Parser(prog="python make.py", description="Makes it.", examples="python make.py --input a\npython make.py --fast b")
    p.add_argument("--input", required=True, nargs="+", metavar="SRC", help="what")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--left", help="one")
    which.add_argument("--right", action="store_true", help="other")
    p.add_argument("--hidden", help=argparse.SUPPRESS, default=3)
    tuned = p.add_argument_group("tuned")
    tuned.add_argument("--size", type=int, default=7, help="bytes")
    tuned.add_argument("--rate", type=float, default=0.0, help="share")
    tuned.add_argument("--fast", action="store_true", help="hurry")
    tuned.add_argument("--name", help="none by default")
    tuned.add_argument("--many", nargs="*", default=[], help="some")
    return p


def test_help_begins_with_examples_and_names_real_defaults(parser: Parser) -> None:
    lines = parser.format_help().splitlines()
    assert lines[:5] == ["Makes it.", "", "examples:", "  python make.py --input a", "  python make.py --fast b"]
    assert lines[6] == "usage: python make.py --input SRC... (--left LEFT | --right) [options]"
    text = "\n".join(lines)
    assert "bytes (default: 7)" in text and "share (default: 0.0)" in text
    assert "None" not in text and "False" not in text and "[]" not in text and "hidden" not in text


def test_a_group_with_nothing_but_help_comes_last() -> None:
    p = Parser(prog="p")
    p.add_argument_group("first").add_argument("--a", help="a")
    lines = [line for line in p.format_help().splitlines() if line.endswith(":")]
    assert lines == ["first:", "options:"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input", "x", "--left", "l", "--siz", "3"], f"unrecognized arguments: --siz 3; did you mean --size? {HELP}"),
        (["--inptu", "x", "--left", "l"], f"unrecognized arguments: --inptu; did you mean --input? {HELP}"),
        (["--input", "x", "--rihgt=3"], f"unrecognized arguments: --rihgt; did you mean --right? {HELP}"),
        (["--input", "x", "--left", "l", "--epochs", "3"], "unrecognized arguments: --epochs 3; --help lists the flags"),
        (["--epochs", "3", "--left", "l"], "the following arguments are required: --input; --help lists the flags"),
        (["--left", "l"], "the following arguments are required: --input; --help lists the flags"),
        (["--input", "x", "--left", "l", "--size", "much"], "argument --size: invalid int value: 'much'; --help lists the flags"),
    ],
)
def test_a_wrong_flag_is_one_sentence(parser: Parser, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match="lists the flags") as refused:
        parser.parse_args(flags)
    assert str(refused.value) == said


@dataclass(frozen=True, kw_only=True)
class Arguments:
    many: tuple[int, ...]
    size: float = 1.0


def test_what_was_parsed_becomes_the_fields_that_are_known() -> None:
    found = argparse.Namespace(many=[3, 4], size=2.0, local_rank=-1)
    assert as_dataclass(Arguments, found) == Arguments(many=(3, 4), size=2.0)
    with pytest.raises(AttributeError, match="size"):  # a field without a flag is our mistake
        as_dataclass(Arguments, argparse.Namespace(many=[]))


@pytest.mark.parametrize("many", [[1, 0], (1, 0)])
def test_each_of_several_values_is_at_least_one(many: list[int] | tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^--many must be at least 1, not 0$"):
        at_least_one(argparse.Namespace(many=many), "many")


def test_nothing_negative_infinite_or_no_number() -> None:
    not_negative(Arguments(many=(), size=0), "size")
    for size in (-0.1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"^--size must be 0 or a number above it, not {size}$"):
            not_negative(Arguments(many=(), size=size), "size")
