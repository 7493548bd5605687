"""What a run is made with: versions, host, commit, and the code itself."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from data.redact import redact
from launch.cli import CLONE

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")
PACKAGE_FOLDERS = ("data", "launch", "model")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def describe_environment() -> dict[str, Any]:
    """Versions, host and commit, for config.json."""
    return {
        "versions": versions(),
        "host": socket.gethostname(),
        "git_commit": git_commit(),
        "command": redact(sys.argv),
    }


def git_commit() -> str | None:
    """The commit that runs, with `-dirty` where files were changed; None without git or outside a clone.

    Git reads no clone of another user's (a shared one) unless told that it is safe, lest its configuration runs code; this clone's
    code runs. A repository above an installed copy is another's.
    """
    if not (CLONE / ".git").exists():
        return None
    command = ["git", "-c", f"safe.directory={CLONE}", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def code_hash() -> str:
    """Of every source file of ours: two hosts with two checkouts train two models."""
    digest = hashlib.sha256()
    for folder in PACKAGE_FOLDERS:
        for path in sorted((CLONE / folder).rglob("*.py")):
            digest.update(str(path.relative_to(CLONE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
