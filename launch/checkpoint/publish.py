"""Folders that appear complete under their name or not at all: hidden working names, renames, and what to do after a crash.

A folder is made under a hidden name and gets its own in one rename. Where the name is taken, the kernel exchanges the two; where it
cannot, two renames do, and `recover` undoes the first if the second never came. Nothing here is collective.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from pathlib import Path

from data.files import sync_folder
from data.terminal import say
from launch.manifest import MANIFEST

#: Folders that only this module makes: being written, on the way to deletion, replaced by another of the same name.
_OURS = re.compile(r"\.(?:tmp|trash|replaced)-(.+)-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.replaced-(.+)-[0-9a-f]{8}")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100  # relative names are relative to the working directory


def working_name(folder: Path, kind: str) -> Path:
    """A fresh hidden name beside `folder`; `kind` is tmp, trash or replaced."""
    return folder.with_name(f".{kind}-{folder.name}-{secrets.token_hex(4)}")


def leftovers(parent: Path) -> list[Path]:
    """Folders with names of `working_name`: what dead processes left, if no living one writes here, which a lock tells.
    Others' hidden folders are not ours to touch."""
    return sorted(p for p in parent.iterdir() if _OURS.fullmatch(p.name) and p.is_dir())


def made_for(working: str) -> str:
    """The name of the folder that a name of `working_name` was made for; what is on its way to deletion may have two around it."""
    while match := _OURS.fullmatch(working):
        working = match[1]
    return working


def publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name. Where the name is taken, the two are exchanged and the old one is deleted."""
    if not os.path.lexists(final):  # a link whose disk is not mounted is in the way as well
        os.rename(temporary, final)
    elif exchange(temporary, final):
        sync_folder(final.parent)
        discard(temporary)
    else:
        old = working_name(final, "replaced")
        if rename_if_possible(final, old):
            os.rename(temporary, final)
            sync_folder(final.parent)
            discard(old)
        else:
            discard(final)
            os.rename(temporary, final)
    sync_folder(final.parent)


def recover(parent: Path) -> None:
    """Put back what `publish` had moved aside when the process died between its two renames."""
    for old in leftovers(parent):
        match = _REPLACED.fullmatch(old.name)
        if match and not (parent / match[1]).exists():
            os.rename(old, parent / match[1])
            sync_folder(parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one atomic step where the kernel and the file system can (Linux renameat2); False where not."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    failed: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return failed == 0


def discard(folder: Path) -> None:
    """Delete a folder. It loses its name first, or else its manifest, so that a half-deleted one is never taken for complete.
    Of a link the name alone is ours."""
    if folder.is_symlink():
        say(f"{folder} was a link; what it points to is kept: {os.path.realpath(folder)}")
        folder.unlink()
        return
    told = folder.name.startswith(".trash-")
    if not told:
        trash = working_name(folder, "trash")
        if rename_if_possible(folder, trash):
            folder = trash
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if not told and folder.exists():
        say(f"warning: {folder} cannot be deleted: it holds files of another owner or without write permission; delete it by hand")


def rename_if_possible(folder: Path, name: Path) -> bool:
    """False where the file system renames no folders: overlayfs, those that came with a container's image."""
    try:
        os.rename(folder, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True
