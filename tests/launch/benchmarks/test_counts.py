"""Counts of the benchmarks' command lines: one that is no count is refused before anything is measured."""

from __future__ import annotations

import argparse
import importlib

import pytest

from data.cli import UserError

TAKES_COUNTS = ("attention", "data", "generate", "growth", "loss", "moe", "preprocess", "step")


def flags_of(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"launch.benchmarks.{name}").add_arguments(parser)
    return parser


def refusal(name: str, *flags: str) -> str:
    with pytest.raises(UserError) as refused:
        importlib.import_module(f"launch.benchmarks.{name}").run(flags_of(name).parse_args(flags))
    return str(refused.value)


@pytest.mark.parametrize("name", TAKES_COUNTS)
def test_every_count_is_at_least_one(name: str) -> None:
    counts = [action.dest for action in flags_of(name)._actions if action.type is int]
    assert counts
    for flag in counts:
        assert refusal(name, f"--{flag}", "0") == f"--{flag} must be at least 1, not 0"


def test_of_several_the_wrong_one_is_named() -> None:
    assert refusal("growth", "--tokens", "1024", "-2") == "--tokens must be at least 1, not -2"


def test_heads_share_key_value_heads_evenly() -> None:
    said = refusal("attention", "--heads", "5", "--key_value_heads", "2")
    assert said == "--heads 5 is no multiple of the 2 heads of --key_value_heads"
