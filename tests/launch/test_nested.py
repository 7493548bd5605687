"""Nested objects by their dotted keys."""

from __future__ import annotations

from launch.nested import differing, leaves


def test_leaves_of_nested_objects() -> None:
    nested = {"a": {"b": 1, "c": {"d": [{"e": 2}]}}, "f": {}, "g": None}
    assert list(leaves(nested)) == [("a.b", 1), ("a.c.d", [{"e": 2}]), ("f", {}), ("g", None)]
    assert list(leaves({})) == [("", {})] and list(leaves(3)) == [("", 3)]


def test_what_differs_is_named_by_its_key() -> None:
    old, new = {"same": {"x": 1}, "a": {"b": 1}, "c": {"d": 2}, "e": None}, {"same": {"x": 1}, "a": {"b": 2, "z": 0}, "f": {"g": 3}}
    assert list(differing(old, new)) == [("a.b", 1, 2), ("a.z", None, 0), ("c", {"d": 2}, None), ("f", None, {"g": 3})]
