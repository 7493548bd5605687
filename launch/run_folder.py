"""A run's folder: its lock, `config.json`, and the refusal of a folder that holds another run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from launch.monitor import redact

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")
#: What must be the same for a run to go on; the rest of config.json may change between its parts.
FIXED = ("model", "data", "sequence_length", "global_batch", "seed", "document_mask")


class FolderLock:
    """Holds a run's folder against a second run. The kernel frees the lock of a process that died: none is left over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Errors: `ValueError` that names the process that holds the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown process"
            raise ValueError(f"{self.folder} is in use by another run ({holder}); end it or name another --output") from None
        except OSError:
            pass  # a file system without locks does without
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in difference(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name}: {json.dumps(old)} -> {json.dumps(new)}"]


def check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds another run. Errors: `ValueError` with the differences."""
    path = folder / "config.json"
    if not path.exists():
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if others:
            raise ValueError(f"--output {folder} holds {others[0]!r} but no run; name a new or empty folder")
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); name another --output") from None
    found = difference({k: held.get(k) for k in FIXED}, {k: identity.get(k) for k in FIXED})
    if found:
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        raise ValueError(f"--output {folder} holds another run: {shown}; name another --output, or the run's own settings")


def describe_environment() -> dict[str, Any]:
    """Versions, host and commit, for config.json."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "host": socket.gethostname(),
        "git_commit": git_commit(),
        "command": redact(sys.argv),
    }


def git_commit() -> str | None:
    """The commit that runs, with `-dirty` where files were changed; None without git or outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_config(folder: Path, config: dict[str, Any], tokenizer_folder: Path) -> None:
    """Publish `config.json` (atomically) and the tokenizer beside it."""
    if not (folder / "tokenizer").exists():
        partial = folder / ".tokenizer"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tokenizer_folder, partial)
        partial.rename(folder / "tokenizer")
    temporary = folder / ".config.json"
    temporary.write_text(json.dumps(redact(config), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")
