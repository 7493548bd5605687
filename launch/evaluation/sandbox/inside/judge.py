"""The judge's side: run the tests of a problem on functions that live in another process, and say what came of it.

The tests' text, this process and its standard output are out of the candidate's reach: it runs in a sandbox of its own, and
between the two go plain values only.

A right program fails whose tests

- hand it a function or an object of their own, a defaultdict (its default does not cross) or what is nested 900 deep, or go on with
  an iterator that they handed over;
- expect back an argument itself (`f(x) is x`), one list at two places, what is nested 900 deep, `type(None)` or SystemExit;
- name a class of the program's in `isinstance` or `except`; use an object of it in `with`, `+`, `str` or, by its own `__eq__`,
  beside a plain value; await a coroutine of it;
- read a generator without end, the fields of a namedtuple or the `errno` of an error that names a file, compare a module's
  constant, or use `in` on what cannot be iterated;
- catch what it prints, or seed `random` for it.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from launch.evaluation.sandbox.inside.channel import Channel, leave_standard_streams
from launch.evaluation.sandbox.inside.values import Unsendable, containers, decode, encode

#: Said before a line of the candidate's program runs: what goes wrong until then is the sandbox's fault. White space to JSON.
MET = b"\n"


class CandidateError(Exception):
    """The candidate raised what is no exception of Python's own."""


class Unanswered(BaseException):
    """A question that the candidate has not answered: it is dead, or what was to cross cannot. No test that expects an exception
    may take it for one of the candidate's."""


@contextmanager
def asking(channel: Channel) -> Iterator[None]:
    """What goes wrong within is no answer: it is raised as Unanswered, at later questions too, and by `run_tests` at the end."""
    try:
        if channel.failure is None:
            yield
            return
    except Exception as error:
        channel.failure = f"{type(error).__name__}: {str(error)[:1000]}".rstrip(": ")
    raise Unanswered(channel.failure)


def comparison(name: str) -> Callable[[Any, object], Any]:
    return lambda one, other: one.operator(name, other) if isinstance(other, Remote) else NotImplemented


class Remote:
    """A function or an object of the candidate: it can be called and handed back, has its attributes (MBPP's tests build trees by
    `root.left = Node(2)`), its length, truth, items and what iterating it gives.

    Equal to, or less than, objects of the candidate as its class says, and nothing of the tests' own: it would equal what is asked.
    For the same reason `in` goes by its items.
    """

    channel: Channel
    reference: str | int

    def __init__(self, channel: Channel, reference: str | int) -> None:
        vars(self).update(channel=channel, reference=reference)  # past __setattr__

    def __getattr__(self, name: str) -> Any:
        """Python asks for what this object does not have by itself; its own protocols are not the candidate's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self.ask({"of": self.reference, "attribute": name})

    def __setattr__(self, name: str, value: Any) -> None:
        with asking(self.channel):
            handed = encode(value, reference_of)
        self.ask({"of": self.reference, "attribute": name, "set": handed})

    def ask(self, request: dict[str, Any], given: Sequence[Any] = ()) -> Any:
        """The value that the candidate answers with. Raises what it raised. given: the containers among what it is handed."""

        def find(reference: str | int) -> Any:
            return given[-1 - reference] if isinstance(reference, int) and reference < 0 else self.sibling(reference)

        with asking(self.channel):
            self.channel.send(request)
            reply: dict[str, Any] = self.channel.receive()
            if "unsendable" in reply:
                raise Unsendable(reply["unsendable"])
            for number, content in reply.get("changed", ()):
                change(given[number], decode(content, find))
            raised = exception_of(reply, self.sibling) if "raised" in reply else None
            value = None if raised else decode(reply["value"], find)
        if raised:
            raise raised
        return value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.apply({"call": self.reference}, arguments, keywords)

    def apply(self, what: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        with asking(self.channel):
            given = list(containers([list(arguments), keywords]))
            by_name = {name: encode(value, reference_of) for name, value in keywords.items()}
            handed = {"arguments": [encode(value, reference_of) for value in arguments], "keywords": by_name}
        return self.ask({**what, **handed}, given)

    def operator(self, name: str, *others: Any) -> Any:
        return self.apply({"operator": name}, (self, *others), {})

    def __len__(self) -> Any:
        return self.operator("len")

    def __bool__(self) -> Any:
        return self.operator("bool")

    def __iter__(self) -> Any:
        return self.operator("iter")

    def __getitem__(self, key: Any) -> Any:
        return self.operator("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.operator("setitem", key, value)

    __eq__, __lt__, __le__, __gt__, __ge__ = map(comparison, ("eq", "lt", "le", "gt", "ge"))

    def __hash__(self) -> int:
        return hash(self.reference)

    def sibling(self, reference: str | int) -> Remote:
        return Remote(self.channel, reference)


class Names(dict[str, Any]):
    """Globals of the tests, which find the names that are `wanted` in the candidate's program, as soon as they are there."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(__name__="tests")
        self.channel = channel
        self.wanted = set[str]()

    def __missing__(self, name: str) -> Any:
        if name not in self.wanted:
            raise KeyError(name)  # Python looks among its own
        remote = Remote(self.channel, name)
        if remote.ask({"name": name}) is not True:
            raise NameError(f"name {name!r} is not defined")
        self[name] = remote
        return remote


def reference_of(value: Any) -> str | int:
    if isinstance(value, Remote):
        return value.reference
    raise Unsendable(f"the tests hand the candidate a value of type {type(value).__name__}")


def exception_of(reply: dict[str, Any], find: Callable[[str | int], Any]) -> Exception:
    """Of the candidate's class by name, and of the nearest of Python's by kind, with its arguments."""
    name, message = str(reply["raised"]), str(reply.get("message", ""))
    kind = getattr(builtins, str(reply.get("kind")), None)
    ends = (StopIteration, StopAsyncIteration)  # which would end a loop of the tests', `map(f, ...)`, before its asserts
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, ends):
        return CandidateError(f"{name}: {message}")
    if name != kind.__name__:
        kind = type(name, (kind,), {})
    made: Exception = CandidateError(f"{name}: {message}")
    for arguments in (reply.get("arguments"), [message]):
        with suppress(TypeError, ValueError):  # a few, such as UnicodeDecodeError, want more than a message
            made = kind(*decode(arguments, find))
            if str(made) == message:
                break
    return made


def change(given: Any, content: list[Any]) -> None:
    """An argument that the candidate changed in place, or what lies in one, is changed here too."""
    if isinstance(given, (list, bytearray)):
        given[:] = content
    elif isinstance(given, deque):
        given.clear()
        given.extend(content)
    elif isinstance(given, (dict, set)):
        given.clear()
        given.update(dict(content) if isinstance(given, dict) else content)  # a Counter would count the pairs


def unknown_names(source: str, known: dict[str, Any]) -> set[str]:
    """What `source` reads and neither it nor `known` nor Python defines: to be found in the candidate's program."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    assigned |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    assigned |= {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    return {node.id for node in names} - assigned - set(known) - set(dir(builtins))


def unimported_modules(source: str, entry_point: str) -> set[str]:
    """Modules of Python's that the tests use by `name.`, for MBPP's leave the import to the candidate. None that they call."""
    nodes = list(ast.walk(ast.parse(source)))
    owners = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return unknown_names(source, {}) & owners & sys.stdlib_module_names - called - {entry_point}


def run_tests(job: dict[str, Any], channel: Channel) -> None:
    """Returns if they pass and each question had an answer, raises if not."""
    first = channel.receive()
    if "raised" in first:
        raise exception_of(first, partial(Remote, channel))
    namespace = Names(channel)
    missing = unknown_names(job["test"], namespace)
    if job["reference"] and missing - {job["entry_point"]}:
        # Helpers that a prompt defines and its tests use. Never the candidate's: those could lie.
        exec(compile(job["reference"], "<reference>", "exec", dont_inherit=True), namespace)
    for name in unimported_modules(job["test"], job["entry_point"]) - set(namespace):
        namespace[name] = importlib.import_module(name)
    namespace.wanted = unknown_names(job["test"], namespace) | {job["entry_point"]}
    namespace.pop(job["entry_point"], None)  # the reference has one too
    for name in namespace.wanted:
        with suppress(NameError):
            namespace[name]  # now: Python asks no __missing__ from within a class
    for name, value in vars(builtins).items():  # by __missing__ each look at one takes ten times as long
        if not name.startswith("__") and name not in namespace.wanted:
            namespace.setdefault(name, value)
    exec(compile(job["test"], "<tests>", "exec", dont_inherit=True), namespace)
    if channel.failure is not None:
        raise Unanswered(channel.failure)


def main(channel: Channel) -> None:
    job = json.loads(sys.stdin.buffer.read())
    verdict_to = os.dup(1)
    leave_standard_streams()
    channel.send({"there": True})
    channel.receive()
    os.write(verdict_to, MET)
    channel.send({"begin": True})
    try:
        run_tests(job, channel)
        verdict = {"passed": True, "result": "passed"}
    except Unanswered as error:
        verdict = {"passed": False, "result": f"failed: {error}"}
    except BaseException as error:
        verdict = {"passed": False, "result": f"failed: {type(error).__name__}: {str(error)[:1000]}".rstrip(": ")}
    os.write(verdict_to, json.dumps(verdict).encode())
