"""Files that stand for others: what git-LFS, Xet and git-annex leave in a clone until somebody fetches the data."""

from __future__ import annotations

from typing import NamedTuple


class Pointer(NamedTuple):
    """A small text file that stands for data which somebody has to fetch first."""

    magic: bytes
    name: str
    remedy: str


POINTERS = (
    Pointer(b"version https://git-lfs.github.com/spec/", "git-LFS pointer", "fetch the file itself with git lfs pull"),
    Pointer(b"version https://hawser.github.com/spec/", "git-LFS pointer", "fetch the file itself with git lfs pull"),
    Pointer(b"# xet version 0", "Xet pointer", "fetch the file itself with git xet or the hub's client"),
    Pointer(b"/annex/objects/", "git-annex pointer", "fetch the file itself with git annex get"),
    Pointer(b"../.git/annex/objects/", "git-annex pointer", "fetch the file itself with git annex get"),
    Pointer(b".git/annex/objects/", "git-annex pointer", "fetch the file itself with git annex get"),
)


def pointer(head: bytes) -> Pointer | None:
    """What a file that begins with `head` stands for, if it is not the file itself."""
    return next((known for known in POINTERS if head.startswith(known.magic)), None)
