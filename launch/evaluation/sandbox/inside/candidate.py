"""The candidate's side: run the program that a model wrote, then answer calls of its functions.

This process knows no test and gives no verdict. All it can send is return values, and right ones are what is asked for.
"""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

from launch.evaluation.sandbox.inside.channel import Channel, leave_standard_streams
from launch.evaluation.sandbox.inside.values import decode, encode


class Candidate:
    """The program's names, and the objects that were returned and have no plain form."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.module = types.ModuleType("solution")
        self.objects: dict[int, Any] = {}
        self.numbers = itertools.count()

    def keep(self, value: Any) -> int:
        number = next(self.numbers)
        self.objects[number] = value
        return number

    def find(self, reference: str | int) -> Any:
        if isinstance(reference, int):
            return self.objects[reference]
        if reference not in self.module.__dict__:
            raise NameError(f"name {reference!r} is not defined")
        return self.module.__dict__[reference]

    def load(self, program: str) -> None:
        sys.modules["solution"] = self.module  # pickle and dataclasses look their module up
        exec(compile(program, "<solution>", "exec", dont_inherit=True), self.module.__dict__)  # not our own `annotations`

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The value of one call, and what it did to its arguments if it changed any; or an attribute, which may be set first."""
        if "attribute" in request:
            owner, name = self.find(request["of"]), request["attribute"]
            if "set" in request:
                setattr(owner, name, decode(request["set"], self.find))
            return {"value": encode(getattr(owner, name), self.keep)}
        function = self.find(request["call"])
        arguments = [decode(value, self.find) for value in request["arguments"]]
        keywords = {name: decode(value, self.find) for name, value in request["keywords"].items()}
        reply = {"value": encode(function(*arguments, **keywords), self.keep)}
        after = [encode(value, self.keep) for value in arguments]
        return reply if after == request["arguments"] else {**reply, "arguments": after}


def raised(error: BaseException) -> dict[str, Any]:
    return {"raised": type(error).__name__, "message": str(error)[:1000]}


def main(channel: Channel) -> None:
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    leave_standard_streams()
    candidate = Candidate(channel)
    try:
        candidate.load(program)
        channel.send({"ready": True})
    except BaseException as error:
        channel.send(raised(error))
        return
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        try:
            channel.send(candidate.answer(request))
        except BaseException as error:
            channel.send(raised(error))
