"""Plain Python values as JSON and back: all that crosses between a candidate and its judge.

Not pickle: whoever reads these bytes runs nothing. None, bool, str, small int, float and list are JSON's own; all else is an
object {"type": ..., "value": ...}. What has no plain form stays where it is
and crosses as a reference, by which it can be handed back.
"""

from __future__ import annotations

import builtins
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Set, ValuesView
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

SMALL_INTEGER = 1 << 63  # Python refuses decimal integers of more than 4,300 digits; hexadecimal has no such limit
LONGEST_ITERATOR = 1_000_000

Keep = Callable[[Any], str | int]
Find = Callable[[str | int], Any]


class Unsendable(Exception):
    """A value beyond what crosses: no error of who made it, nor of who asked."""


def encode(value: Any, keep: Keep) -> Any:
    """JSON's form of `value`. keep: stores an object that has none and gives its reference."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if -SMALL_INTEGER < value < SMALL_INTEGER else {"type": "int", "value": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    return encode_tagged(value, keep)


def encode_tagged(value: Any, keep: Keep) -> dict[str, Any]:
    if is_python_type(value):
        return {"type": "type", "value": value.__name__}
    name, plain = next(((name, plain(value)) for kind, name, plain in TAGGED if isinstance(value, kind)), ("object", None))
    if name == "object":
        return {"type": name, "value": keep(value)}
    return {"type": name, "value": encode(plain, keep)}


def is_python_type(value: Any) -> bool:
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def first_items(iterator: Iterator[Any]) -> list[Any]:
    """A generator's items: the judge receives an iterator over them."""
    items = []
    for item in iterator:
        items.append(item)
        if len(items) > LONGEST_ITERATOR:
            raise Unsendable(f"an iterator of more than {LONGEST_ITERATOR} items")
    return items


TAGGED: list[tuple[type, str, Callable[[Any], Any]]] = [
    (tuple, "tuple", list),
    (deque, "deque", lambda value: [list(value), value.maxlen]),
    (KeysView, "dict_keys", list),
    (ItemsView, "dict_items", list),
    (ValuesView, "dict_values", list),
    (Counter, "Counter", dict),
    (OrderedDict, "OrderedDict", lambda value: [[key, item] for key, item in value.items()]),
    (Mapping, "dict", lambda value: [[key, item] for key, item in value.items()]),
    (frozenset, "frozenset", list),
    (Set, "set", list),
    (bytearray, "bytearray", bytearray.hex),
    (bytes, "bytes", bytes.hex),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (Fraction, "Fraction", lambda value: [value.numerator, value.denominator]),
    (Decimal, "Decimal", str),
    (range, "range", lambda value: [value.start, value.stop, value.step]),
    (datetime, "datetime", datetime.isoformat),
    (date, "date", date.isoformat),
    (time, "time", time.isoformat),
    (timedelta, "timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    (Iterator, "iterator", first_items),
]


def python_type(name: str) -> type:
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise ValueError(f"{name} is no type of Python's")
    return found


BUILD: dict[str, Callable[[Any], Any]] = {
    "int": lambda value: int(value, 16),
    "tuple": tuple,
    "deque": lambda value: deque(*value),
    "dict_keys": lambda value: dict.fromkeys(value).keys(),
    "dict_items": lambda value: dict(value).items(),
    "dict_values": lambda value: dict(enumerate(value)).values(),
    "Counter": Counter,
    "OrderedDict": OrderedDict,
    "dict": dict,
    "frozenset": frozenset,
    "set": set,
    "bytearray": bytearray.fromhex,
    "bytes": bytes.fromhex,
    "complex": lambda value: complex(*value),
    "Fraction": lambda value: Fraction(*value),
    "Decimal": Decimal,
    "type": python_type,
    "range": lambda value: range(*value),
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda value: timedelta(*value),
    "iterator": iter,
}


def decode(value: Any, find: Find) -> Any:
    """The value of `encode`'s form. find: the object (or a stand-in) of a reference. Raises ValueError for an unknown type."""
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    if value["type"] == "object":
        return find(value["value"])
    if value["type"] not in BUILD:
        raise ValueError(f"no value of type {value['type']}")
    return BUILD[value["type"]](decode(value["value"], find))


def containers(value: Any) -> Iterator[Any]:
    """What can be changed of `value`: itself and what lies in it. In the same order for a value and for what it is decoded to."""
    if isinstance(value, (Mapping, list, deque, bytearray, Set)) and not isinstance(value, (frozenset, KeysView, ItemsView)):
        yield value
    if isinstance(value, (Mapping, list, deque, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            if not isinstance(item, (int, float, str)):  # most items, and 0.6 s a million otherwise
                yield from containers(item)
