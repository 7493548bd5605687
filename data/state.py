"""What a killed job finds again: arguments, position, open shards and journals, in one small file that is replaced atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from data.corpus import Source
from data.shards import MANIFEST, SPLITS, write_atomic

STATE = "state.json"
LOCK = ".lock"
REJECTED = "rejected.jsonl"
KEY_JOURNAL = "seen_keys.bin"
NEAR_JOURNAL = "seen_signatures.bin"
JOURNALS = (REJECTED, KEY_JOURNAL, NEAR_JOURNAL)
KEYS_BYTES = 16


def input_listing(sources: Sequence[Source]) -> list[list[Any]]:
    """[name, bytes, number of files] of each source: a changed input is a changed argument."""
    return [[s.name, s.size, len(s.files)] for s in sources]


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each argument that is not what it was."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), json.loads(json.dumps(now.get(key)))
        if old == new:
            continue
        if key == "input_files":
            before, after = old or [], new or []
            changed = [f"{f[0]} ({f[1]} bytes)" for f in [*before, *after] if f not in before or f not in after]
            found.append(f"the input changed: {', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}")
        else:
            found.append(f"--{key} was {old}, now {new}")
    return found


def check_same(then: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raises ValueError with the difference where the folder was begun with other arguments."""
    found = differences(then, now)
    if found:
        raise ValueError(f"{output} was begun with other arguments ({'; '.join(found)}); use those, or another --output")


class Ledger:
    """`state.json` and the journals beside it, which are cut back to the lengths the state knows when a job goes on."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: IO[bytes]) -> None:
        self.folder, self.state, self.lock = folder, state, lock
        lengths = state.get("journals", {})
        self.journals = {name: self._journal(name, lengths.get(name, 0)) for name in JOURNALS}

    @classmethod
    def open(cls, folder: Path, arguments: dict[str, Any]) -> Ledger:
        """Begin a job in an empty folder, or go on with the same one. ValueError for anything else."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STATE
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if STATE not in strangers and set(strangers) - {REJECTED}:
            raise ValueError(f"--output {folder} is not empty ({', '.join(strangers[:4])}) and holds no job of ours; name another")
        lock = _lock(folder)
        try:
            if path.is_file():
                state = json.loads(path.read_text(encoding="utf-8"))
                check_same(state["arguments"], arguments, folder)
            else:
                state = {"arguments": json.loads(json.dumps(arguments))}
                write_atomic(path, json.dumps(state).encode())
            return cls(folder, state, lock)
        except BaseException:
            lock.close()
            raise

    def _journal(self, name: str, length: int) -> IO[bytes]:
        file = open(self.folder / name, "ab")  # noqa: SIM115 (kept open across calls)
        if file.tell() < length:
            raise ValueError(f"{self.folder / name} is shorter than the job's state says; remove the folder and start again")
        file.truncate(length)
        file.seek(length)
        return file

    def append(self, journal: str, data: bytes) -> None:
        self.journals[journal].write(data)

    def append_rejected(self, name: str, line: int | None, reason: str) -> None:
        row = {"file": name, "line": line, "reason": reason}
        self.append(REJECTED, json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    def sync(self) -> None:
        for journal in self.journals.values():
            journal.flush()
            os.fsync(journal.fileno())

    def save(self, **progress: Any) -> None:
        """Everything up to `progress` is durable when this returns."""
        self.sync()
        self.state |= progress
        self.state["journals"] = {name: journal.tell() for name, journal in self.journals.items()}
        write_atomic(self.folder / STATE, json.dumps(self.state).encode())

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """A job that fails before anything of it is durable leaves its folder free for other arguments."""
        self.close()
        if isinstance(error, Exception) and "position" not in self.state:
            clear(self.folder)

    def close(self) -> None:
        """After an error: what is not durable yet is lost anyway, so a disk that is still full must not hide that error."""
        for file in (*self.journals.values(), self.lock):
            with contextlib.suppress(OSError):
                file.close()


def _lock(folder: Path) -> IO[bytes]:
    """Held until the process ends. A file system without locks does without."""
    file = open(folder / LOCK, "wb")  # noqa: SIM115 (held open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a forked worker would hold it too
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another job is writing to {folder}; wait for it, or name another --output") from None
    except OSError:
        pass
    return file


def clear(folder: Path) -> None:
    """Remove all that a job of ours made, but for `rejected.jsonl`, which says why it failed."""
    for name in (*SPLITS, "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _clear_files(folder)


def _clear_files(folder: Path) -> None:
    for name in (KEY_JOURNAL, NEAR_JOURNAL, LOCK, f".{STATE}.tmp", f".{MANIFEST}.tmp", STATE):
        (folder / name).unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """The manifest is there, so the job is complete: only it, the shards, the tokenizer and `rejected.jsonl` stay."""
    assert (folder / MANIFEST).is_file()
    for split in SPLITS:
        for path in (folder / split).glob(".*.tmp"):
            path.unlink()
    _clear_files(folder)  # the state last of all: while it is there, something may be left
