"""Shared runs of ten words against the slow formula."""

from __future__ import annotations

from typing import Any

from data_helpers import overlaps, words
from hypothesis import given
from hypothesis import strategies as st

from data.filters.contamination import Contamination

NAMES = st.lists(st.sampled_from(["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "i", "7", "12"]), max_size=60).map(" ".join)


@given(st.lists(NAMES, min_size=1, max_size=4), NAMES, st.data())
def test_contamination_is_the_slow_formula(tasks: list[str], text: str, data: Any) -> None:
    if data.draw(st.booleans()):
        source = words(data.draw(st.sampled_from(tasks)))
        text += " " + " ".join(source[data.draw(st.integers(0, 3)) :])
    found = Contamination({"bench": tasks})(text, {})
    assert found == ("overlaps bench" if overlaps(text, tasks) else None)


def test_a_task_of_just_ten_words_is_found_at_the_end_of_a_document() -> None:
    task = "def add_two numbers first second return the sum of both"
    assert Contamination({"bench": [task]})("x = 1\n" + task, {}) == "overlaps bench"
    assert Contamination({"bench": [task]})(task, {}) == "overlaps bench"


def test_numbers_of_any_kind_are_no_names() -> None:
    table = "0x1f 1e5 2L 3rd 0b11 data = [first, second, third, fourth"
    assert not Contamination({"bench": [table]})(table, {})
    assert Contamination({"bench": [table.replace("3rd", "rd3")]})(table.replace("3rd", "rd3"), {}) == "overlaps bench"
