"""The candidate's side: run the program that a model wrote, then answer calls of its functions.

This process knows no test and gives no verdict. All it can send is return values, and right ones are what is asked for.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

from launch.evaluation.sandbox.inside.channel import Channel, leave_standard_streams
from launch.evaluation.sandbox.inside.values import Unsendable, containers, decode, encode, is_python_type

OPERATORS: dict[str, Callable[..., Any]] = {"len": len, "bool": bool, "iter": iter}
OPERATORS |= {name: getattr(operator, name) for name in ("getitem", "setitem", "eq", "lt", "le", "gt", "ge")}


class Given:
    """In the place of a container that an argument holds, where what another holds now is told."""

    def __init__(self, number: int) -> None:
        self.number = number


def items_of(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def same(was: list[Any], now: list[Any]) -> bool:
    """The same objects: an equal one in its place is a change, and an iterator is not looked into, which would empty it."""
    return len(was) == len(now) and all(map(operator.is_, was, now))


class Candidate:
    """The program's names, and the objects that were returned and have no plain form."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.module = types.ModuleType("solution")
        self.objects: dict[int, Any] = {}

    def keep(self, value: Any) -> int:
        """A number below 0 for what the judge has itself."""
        if isinstance(value, Given):
            return -1 - value.number
        self.objects[id(value)] = value  # and so its id stays its own
        return id(value)

    def find(self, reference: str | int) -> Any:
        if isinstance(reference, int):
            return self.objects[reference]
        if reference not in self.module.__dict__:
            raise NameError(f"name {reference!r} is not defined")
        return self.module.__dict__[reference]

    def load(self, program: str) -> None:
        sys.modules["solution"] = self.module  # pickle and dataclasses look their module up
        exec(compile(program, "<solution>", "exec", dont_inherit=True), self.module.__dict__)  # not our own `annotations`

    def encoded(self, value: Any) -> Any:
        """Raises Unsendable for what is nested too deep, which is no RecursionError of the program's."""
        try:
            return encode(value, self.keep)
        except RecursionError:
            raise Unsendable("a value nested too deep") from None

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.answer(request)
        except Unsendable as error:
            return {"unsendable": str(error)}
        except BaseException as error:
            return self.raised(error)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The value of one call or operator, or what it raised, and what it did to its arguments; an attribute, which may be set
        first; or whether there is a name."""
        if "name" in request:
            return {"value": request["name"] in self.module.__dict__}
        if "attribute" in request:
            owner, name = self.find(request["of"]), request["attribute"]
            if "set" in request:
                setattr(owner, name, decode(request["set"], self.find))
            return {"value": self.encoded(getattr(owner, name))}
        function = OPERATORS[request["operator"]] if "operator" in request else self.find(request["call"])
        arguments = decode(request["arguments"], self.find)
        keywords = {name: decode(value, self.find) for name, value in request["keywords"].items()}
        held = list(containers([arguments, keywords]))
        before = [items_of(one) for one in held]
        try:
            reply = {"value": self.encoded(function(*arguments, **keywords))}
        except Unsendable:
            raise
        except BaseException as error:
            reply = self.raised(error)
        changed = [n for n, (was, one) in enumerate(zip(before, held, strict=True)) if not same(was, items_of(one))]
        return {**reply, "changed": self.contents(changed, held)} if changed else reply

    def contents(self, changed: list[int], held: list[Any]) -> list[Any]:
        """The number and, in JSON's form, the content of each that changed; a container of the arguments in it is named, so that
        it stays the same one."""
        numbers = {id(one): number for number, one in enumerate(held)}

        def named(item: Any) -> Any:
            if id(item) in numbers:
                return Given(numbers[id(item)])
            return tuple(map(named, item)) if type(item) is tuple else item

        contents = [held[n].items() if isinstance(held[n], dict) else held[n] for n in changed]
        return [[n, self.encoded([named(item) for item in now])] for n, now in zip(changed, contents, strict=True)]

    def raised(self, error: BaseException) -> dict[str, Any]:
        """kind: the nearest class of Python's own, which a test can expect."""
        kind = next(kind.__name__ for kind in type(error).__mro__ if is_python_type(kind))
        try:
            arguments = encode(list(error.args), self.keep)
        except Exception:  # what has no end, above all
            arguments = None
        return {"raised": type(error).__name__, "kind": kind, "message": str(error)[:1000], "arguments": arguments}


def main(channel: Channel) -> None:
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    leave_standard_streams()
    channel.send(channel.receive())  # both pipes lead to the judge
    channel.receive()  # which has said so
    candidate = Candidate(channel)
    try:
        candidate.load(program)
        channel.send({"ready": True})
    except BaseException as error:
        channel.send(candidate.raised(error))
        return
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        reply = candidate.reply(request)
        try:
            channel.send(reply)
        except Exception as error:  # too long
            channel.send({"unsendable": str(error)})
