"""What a killed job finds again: arguments, position, open shards and journals, in one small file that is replaced atomically."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from data.cli import UserError
from data.files import make_folder, naming, read_json, replace_file, sync_file
from data.lock import FolderLock, take_folder
from data.pipeline.arguments import PreprocessArguments
from data.pipeline.inputs import INPUTS
from data.shards import LISTING_BYTES, MANIFEST, SPLITS, load_manifest
from data.sources.blocks import Rejection
from data.sources.discover import Source

STATE = "state.json"
REJECTED = "rejected.jsonl"
REMOVED = "removed.jsonl"
KEY_JOURNAL = "seen_keys.bin"
NEAR_JOURNAL = "seen_signatures.bin"
JOURNALS = (REJECTED, REMOVED, KEY_JOURNAL, NEAR_JOURNAL)
KEYS_BYTES = 16


def input_listing(sources: Sequence[Source]) -> list[list[Any]]:
    """[name, bytes, number of files] of each source: a changed input is a changed argument."""
    return [[s.name, s.size, len(s.files)] for s in sources]


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each argument that is not what it was."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        old, new = (json.loads(json.dumps(side.get(key, PreprocessArguments.default(key)))) for side in (then, now))
        if old == new:
            continue
        if key == "input_files":
            before, after = (dict.fromkeys(map(tuple, side or [])) for side in (old, new))  # a lookup each: there may be millions
            changed = [f"{f[0]} ({f[1]} bytes)" for f in [*before, *after] if f not in before or f not in after]
            named = ", ".join(changed[:4]) or "the same files in another order"
            found.append(f"the input changed: {named}{' ...' if len(changed) > 4 else ''}")
        else:
            found.append(f"--{key} was {old}, now {new}")
    return found


def check_same(then: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raises UserError with the difference where the folder was begun with other arguments."""
    found = differences(then, now)
    if found:
        raise UserError(f"{output} was begun with other arguments ({'; '.join(found)}); use those, or another --output")


def check_flags(folder: Path, wanted: dict[str, Any]) -> None:
    """`check_same` but for the files themselves, before these are compared by name: what another `--input` does not read is not
    gone."""
    if (folder / MANIFEST).is_file():
        then = load_manifest(folder)["arguments"]
    elif (folder / STATE).is_file():
        then = read_state(folder / STATE)["arguments"]
    else:
        return
    old, new = ([name for name, *_ in of.get("decontaminate") or ()] for of in (then, wanted))
    files = ("input_files", "decontaminate") if old == new else ("input_files",)
    check_same(then | {name: wanted[name] for name in files}, wanted, folder)


def read_state(path: Path) -> dict[str, Any]:
    """Raises UserError: checkpoints and data sets saved by others have a file of this name too."""
    try:
        state = read_json(path, LISTING_BYTES)
    except ValueError:
        state = None
    if not isinstance(state, dict) or not isinstance(state.get("arguments"), dict):
        raise UserError(f"--output {path.parent} holds a {path.name} that is no job's of ours; name another folder")
    return state


class Ledger:
    """`state.json` and the journals beside it, which are cut back to the lengths the state knows when a job goes on."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: FolderLock) -> None:
        self.folder, self.state, self.lock = folder, state, lock
        lengths = state.get("journals", {})
        self.journals = {name: self._journal(name, lengths.get(name, 0)) for name in JOURNALS}

    @classmethod
    def open(cls, folder: Path, arguments: dict[str, Any]) -> Ledger:
        """Begin a job in an empty folder, or go on with the same one. Raises UserError for anything else."""
        make_folder(folder)
        path = folder / STATE
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if not {STATE, MANIFEST} & set(strangers) and set(strangers) - {REJECTED}:
            raise UserError(f"--output {folder} is not empty ({', '.join(strangers[:4])}) and holds no job of ours; name another")
        if path.is_file():
            read_state(path)  # a stranger's, before anything of ours stands beside it
        lock = take_folder(folder, "job")
        try:
            if (folder / MANIFEST).is_file():  # what is left of its state would have us cut its shards back
                raise UserError(f"another job has completed {folder} meanwhile; use it, or name another --output")
            if path.is_file():
                state = read_state(path)
                check_same(state["arguments"], arguments, folder)
            else:
                state = {"arguments": json.loads(json.dumps(arguments))}
                replace_file(path, json.dumps(state).encode())
            return cls(folder, state, lock)
        except BaseException:
            lock.release()
            raise

    def _journal(self, name: str, length: int) -> IO[bytes]:
        file = open(self.folder / name, "ab")  # noqa: SIM115 (kept open across calls)
        if file.tell() < length:
            raise UserError(f"{self.folder / name} is shorter than the job's state says; remove the folder and start again")
        file.truncate(length)
        file.seek(length)
        return file

    def append(self, journal: str, data: bytes) -> None:
        file = self.journals[journal]
        with naming(file.name):
            file.write(data)

    def append_rejection(self, journal: str, rejection: Rejection) -> None:
        row = {"file": rejection.name, "line": rejection.line, "reason": rejection.reason}
        self.append(journal, json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    def sync(self) -> None:
        for journal in self.journals.values():
            with naming(journal.name):
                sync_file(journal)

    def save(self, **progress: Any) -> None:
        """Everything up to `progress` is durable when this returns."""
        self.sync()
        self.state |= progress
        self.state["journals"] = {name: journal.tell() for name, journal in self.journals.items()}
        replace_file(self.folder / STATE, json.dumps(self.state).encode())

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """A job that is complete leaves only its result, and one that fails before anything of it is durable a folder that is free
        for other arguments; both as long as nobody else can begin in it."""
        try:
            self.close()
            if error is None:
                clear_leftovers(self.folder)
            elif isinstance(error, Exception) and "position" not in self.state:
                clear(self.folder)
        finally:
            self.lock.release()

    def close(self) -> None:
        """After an error: what is not durable yet is lost anyway, so a disk that is still full must not hide that error."""
        for file in self.journals.values():
            with contextlib.suppress(OSError):
                file.close()


def clear(folder: Path) -> None:
    """Remove all that a job of ours made, but for `rejected.jsonl`, which says why it failed."""
    for name in (*SPLITS, "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (REMOVED, INPUTS):
        (folder / name).unlink(missing_ok=True)
    _clear_files(folder)


def _clear_files(folder: Path) -> None:
    # The lock last: from then on another job may begin. Before it the state: while that is there, something may be left.
    for name in (KEY_JOURNAL, NEAR_JOURNAL, f".{STATE}.tmp", f".{MANIFEST}.tmp", STATE, FolderLock.NAME):
        (folder / name).unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """The manifest is there, so the job is complete: it, the shards, the tokenizer and the lists of documents and inputs stay."""
    assert (folder / MANIFEST).is_file()
    for split in SPLITS:
        for path in (folder / split).glob(".*.tmp"):
            path.unlink(missing_ok=True)
    _clear_files(folder)
