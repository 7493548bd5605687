"""Messages between a candidate and its judge: one JSON object a line, of a bounded length, over two pipes."""

from __future__ import annotations

import json
import os
from typing import Any

MESSAGE_BYTES = 16 << 20
READ_BYTES = 1 << 16


def leave_standard_streams() -> None:
    """From here on nothing is read and what is printed goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Channel:
    """One end. Raises EOFError where the other side is gone, ValueError for what is no message.

    `failure`: why the judge has given up asking.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.rest = b""
        self.failure: str | None = None

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(line)} bytes; {MESSAGE_BYTES} is the most")
        while line:
            line = line[os.write(self.writing, line) :]

    def receive(self) -> dict[str, Any]:
        parts, size = [self.rest], len(self.rest)
        while b"\n" not in parts[-1]:
            part = os.read(self.reading, READ_BYTES)
            size += len(part)
            if not part:
                raise EOFError("the other side has ended")
            if size > MESSAGE_BYTES:
                raise ValueError(f"a message of more than {MESSAGE_BYTES} bytes")
            parts.append(part)
        line, _, self.rest = b"".join(parts).partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a message that is no JSON object")
        return message
