"""The judge's side: run the tests of a problem on functions that live in another process, and say what came of it.

The tests' text, this process and its standard output are out of the candidate's reach: it runs in a sandbox of its own, and
between the two go plain values only.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from typing import Any

from launch.evaluation.sandbox.inside.channel import Channel, leave_standard_streams
from launch.evaluation.sandbox.inside.values import decode, encode


class CandidateError(Exception):
    """The candidate raised what is no exception of Python's own."""


class Remote:
    """A function or an object of the candidate: it can be called and handed back, and has its attributes (MBPP's tests build trees
    by `root.left = Node(2)`). Equal to itself only."""

    channel: Channel
    reference: str | int

    def __init__(self, channel: Channel, reference: str | int) -> None:
        vars(self).update(channel=channel, reference=reference)  # past __setattr__

    def __getattr__(self, name: str) -> Any:
        """Python asks for what this object does not have by itself; its own protocols are not the candidate's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return decode(self.ask({"of": self.reference, "attribute": name})["value"], self.sibling)

    def __setattr__(self, name: str, value: Any) -> None:
        self.ask({"of": self.reference, "attribute": name, "set": encode(value, reference_of)})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The candidate's reply. Raises what it raised."""
        self.channel.send(request)
        reply: dict[str, Any] = self.channel.receive()
        if "raised" in reply:
            raise exception_of(reply)
        return reply

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        reply = self.ask(
            {
                "call": self.reference,
                "arguments": [encode(value, reference_of) for value in arguments],
                "keywords": {name: encode(value, reference_of) for name, value in keywords.items()},
            }
        )
        for given, changed in zip(arguments, reply.get("arguments", ()), strict=False):
            change(given, decode(changed, self.sibling))
        return decode(reply["value"], self.sibling)

    def sibling(self, reference: str | int) -> Remote:
        return Remote(self.channel, reference)


def reference_of(value: Any) -> str | int:
    if isinstance(value, Remote):
        return value.reference
    raise TypeError(f"the tests hand the candidate a {type(value).__name__}, which cannot be sent")


def exception_of(reply: dict[str, Any]) -> Exception:
    kind = getattr(builtins, str(reply["raised"]), None)
    message = str(reply.get("message", ""))
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # a few, such as UnicodeDecodeError, want more than a message
            pass
    return CandidateError(f"{reply['raised']}: {message}")


def change(given: Any, after: Any) -> None:
    """An argument that the candidate changed in place is changed here too."""
    if isinstance(given, (list, bytearray)) and type(given) is type(after):
        given[:] = after
    elif isinstance(given, (dict, set)) and type(given) is type(after):
        given.clear()
        given.update(after)


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
    """Returns if they pass, raises if they do not."""
    first = channel.receive()
    if "raised" in first:
        raise exception_of(first)
    namespace: dict[str, Any] = {"__name__": "tests"}
    missing = unknown_names(job["test"], namespace)
    if job["reference"] and missing - {job["entry_point"]}:
        # Helpers that a prompt defines and its tests use. Never the candidate's: those could lie.
        exec(compile(job["reference"], "<reference>", "exec", dont_inherit=True), namespace)
    for name in unimported_modules(job["test"], job["entry_point"]) - set(namespace):
        namespace[name] = importlib.import_module(name)
    for name in unknown_names(job["test"], namespace) | {job["entry_point"]}:
        namespace[name] = Remote(channel, name)
    exec(compile(job["test"], "<tests>", "exec", dont_inherit=True), namespace)


def main(channel: Channel) -> None:
    job = json.loads(sys.stdin.buffer.read())
    verdict_to = os.dup(1)
    leave_standard_streams()
    try:
        run_tests(job, channel)
        verdict = {"passed": True, "result": "passed"}
    except BaseException as error:
        verdict = {"passed": False, "result": f"failed: {type(error).__name__}: {str(error)[:1000]}".rstrip(": ")}
    os.write(verdict_to, json.dumps(verdict).encode())
