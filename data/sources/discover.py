"""Where documents come from: the inputs of the command line as a fixed, ordered list of sources.

A source is one file of JSON Lines or Parquet, one tree of source files, or one hub data set. The order (arguments as given, files
sorted by path) is part of the output's identity: the same inputs give the same bytes.
"""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.cli import NotFound, UserError, counted

#: Never plain `.json`: a source tree is full of those.
DATA_SUFFIXES = (
    ".jsonl",
    *(f"{name}{compressed}" for name in (".json", ".jsonl") for compressed in (".gz", ".zst", ".bz2", ".xz")),
    ".parquet",
)
ALL_DATA_SUFFIXES = (*DATA_SUFFIXES, ".json")
SOURCE_SUFFIXES = (".py",)
#: Folders without code that anyone wrote for this project: version control, caches, installed packages.
SKIPPED_FOLDERS = frozenset({".git", ".hg", ".svn", "__pycache__", "node_modules", "site-packages", "dist-packages"})
#: What ends the path of a folder that cannot be looked into.
UNREADABLE = os.sep
STDLIB_SKIPPED_FOLDERS = SKIPPED_FOLDERS | {"test", "tests", "idlelib"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One thing to read. `size` in bytes on disk (0 where it is not known), `files` only for a tree (relative to `name`)."""

    kind: str  # "file" (JSON Lines, Parquet or a tar archive, decided by its first bytes), "tree" or "hub"
    name: str
    size: int
    files: tuple[str, ...] = ()
    path: str = ""  # where the bytes lie, if not under `name`: a file of an archive
    left_out: tuple[str, ...] = ()  # a tree's files of other endings, or a folder's beside this one of its data files

    @property
    def at(self) -> str:
        return self.path or self.name


def find_sources(
    inputs: Sequence[str], *, exclude: Path | None = None, suffixes: tuple[str, ...] = SOURCE_SUFFIXES
) -> list[Source]:
    """All sources of `inputs` (files, folders, globs, `tree:FOLDER`, `stdlib`, `hub:NAME`), each file once.

    `exclude` is a folder never looked into: the job's own output. Raises UserError or NotFound with the input named.
    """
    sources: list[Source] = []
    for text in inputs:
        sources += _expand(text, exclude.resolve() if exclude else None, suffixes)
    unique = list(_once(sources))
    if not unique:
        raise NotFound(f"nothing to read: no files in {' '.join(inputs)}")
    return unique


def _once(sources: Iterable[Source]) -> Iterator[Source]:
    """Without what an earlier source holds: `src/**` matches a folder and each folder and file in it."""
    seen: set[str] = set()
    folders: dict[str, str] = {}

    def is_new(identity: str) -> bool:
        known = identity in seen
        seen.add(identity)
        return not known

    def resolved(path: str) -> str:
        """By its folder, unless it is a link itself: of a tree's million files there are few of these."""
        folder, name = os.path.split(path)
        if os.path.islink(path):
            return os.path.realpath(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    for source in sources:
        if source.kind != "tree" or source.files == ("",):
            if is_new(f"hub:{source.name}" if source.kind == "hub" else os.path.realpath(source.name)):
                yield source
            continue
        files = tuple(name for name in source.files if is_new(resolved(os.path.join(source.name, name))))
        if len(files) == len(source.files):
            yield source
        elif files:
            yield replace(source, files=files, size=_total(Path(source.name), files))


def _expand(text: str, exclude: Path | None, suffixes: tuple[str, ...]) -> list[Source]:
    if text == "stdlib":
        return [replace(_tree(Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_SKIPPED_FOLDERS, exclude), left_out=())]
    if text.startswith("hub:"):
        return [Source(kind="hub", name=text.removeprefix("hub:"), size=0)]
    if text.startswith("tree:"):
        return [_tree(Path(text.removeprefix("tree:")), suffixes, SKIPPED_FOLDERS, exclude)]
    path = Path(text)
    if path.is_dir():
        return _folder(path, suffixes, exclude)
    if glob.has_magic(text) and not path.exists():
        return _glob(text, suffixes, exclude)
    if not path.exists():
        raise NotFound(f"no input at {text}; give a file, a folder, a glob, `stdlib` or `hub:NAME`")
    return [_named(path, suffixes)]


def _glob(pattern: str, suffixes: tuple[str, ...], exclude: Path | None) -> list[Source]:
    matches = sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in matches if not _lies_in(path, exclude)]
    if not paths:
        raise NotFound(f"no input matches {pattern}" + (f" outside of --output {exclude}, which is no input" if matches else ""))
    found: list[Source] = []
    for path in map(Path, paths):
        found += _folder(path, suffixes, exclude) if path.is_dir() else [_named(path, suffixes)]
    return found


def _lies_in(path: str, folder: Path | None) -> bool:
    """A glob over a folder finds the job's own output in it as soon as there is one."""
    if folder is None:
        return False
    whole = Path(path).resolve()
    return folder == whole or folder in whole.parents


def _named(path: Path, suffixes: tuple[str, ...]) -> Source:
    """A file given by name is read whatever its extension; a source file becomes a tree of one."""
    if path.name.endswith(tuple(filter(None, suffixes))):  # with all endings a file of data stays one
        return Source(kind="tree", name=str(path.parent / path.name), size=_size(path), files=("",))
    return Source(kind="file", name=str(path), size=_size(path))


def _size(path: str | Path) -> int:
    """Bytes of a regular file; -1 for what cannot be read as one (a broken link, a pipe), which the reader then reports."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _folder(folder: Path, suffixes: tuple[str, ...], exclude: Path | None) -> list[Source]:
    """A folder of data files, or a source tree; a folder that is both must be named as one of them."""
    names = list(_walk(folder, SKIPPED_FOLDERS, exclude))
    sources = [name for name in names if is_source(name, suffixes)]
    packed = [name for name in names if name.endswith(DATA_SUFFIXES) and not is_source(name, suffixes)]
    if sources and packed:
        raise UserError(
            f"{folder} holds source files ({sources[0]}) and data files ({packed[0]}): say tree:{folder} for the source files "
            f"or a glob like '{folder}/*{Path(packed[0]).suffix}' for the data files"
        )
    if sources:
        return [_tree(folder, suffixes, SKIPPED_FOLDERS, exclude)]
    found = [name for name in names if name.endswith((*ALL_DATA_SUFFIXES, UNREADABLE))]
    others = tuple(name for name in names if not name.endswith((*ALL_DATA_SUFFIXES, UNREADABLE)))
    if not found:
        held = f"; it holds {describe_endings(others)}" if others else ""
        archives = f"; name archives themselves, as '{folder}/*.tar*'" if any(".tar" in name for name in others) else ""
        raise NotFound(f"no files to read in {folder}: no {' '.join((*ALL_DATA_SUFFIXES, *suffixes))}{held}{archives}")
    files = [Source(kind="file", name=str(folder / name), size=_size(folder / name)) for name in found]
    return [replace(files[0], left_out=others), *files[1:]]


def describe_endings(names: Sequence[str]) -> str:
    """How many files of which endings, the most frequent first: `192 files (100 .cpp, 92 .h)`."""
    counts = Counter(Path(name).suffix or "without an ending" for name in names).most_common()
    shown = ", ".join(f"{count} {ending}" for ending, count in counts[:5])
    return f"{counted(len(names), 'file')} ({shown}{', ...' if len(counts) > 5 else ''})"


def _tree(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str], exclude: Path | None) -> Source:
    if not root.is_dir():
        raise NotFound(f"no folder at {root}")
    names = list(_walk(root, skipped, exclude))
    files = tuple(name for name in names if name.endswith((*suffixes, UNREADABLE)))
    others = tuple(name for name in names if not name.endswith((*suffixes, UNREADABLE)))
    if not files:
        held = f"; it holds {describe_endings(others)}: name their endings with --suffixes" if others else ""
        raise NotFound(f"no {' '.join(suffixes)} files in {root}{held}")
    return Source(kind="tree", name=str(root), size=_total(root, files), files=files, left_out=others)


def is_source(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file that no `tree:` names is a source file: with all endings (`""` among them) a file of data stays one."""
    return name.endswith(tuple(filter(None, suffixes))) or ("" in suffixes and not name.endswith(DATA_SUFFIXES))


def _total(root: Path, files: Iterable[str]) -> int:
    return sum(max(_size(root / name), 0) for name in files)


def _walk(root: Path, skipped: frozenset[str], exclude: Path | None) -> Iterable[str]:
    """Relative paths of all files, sorted. Links to folders outside of `root` are followed, each folder once: no loop traps us.

    A folder that cannot be looked into comes by its own path and UNREADABLE: for the reader to report, or it would be missing
    without a word.
    """
    names: list[str] = []

    def keep(error: OSError) -> None:
        if os.fspath(error.filename) == os.fspath(root):
            raise error
        names.append(os.path.relpath(error.filename, root) + UNREADABLE)

    followed = [root.resolve()]

    def is_new(path: str) -> bool:
        if not os.path.islink(path):
            return True
        target = Path(path).resolve()
        if followed[0].is_relative_to(target) or any(target.is_relative_to(other) for other in followed):
            return False
        followed.append(target)
        return True

    for folder, folders, files in os.walk(root, onerror=keep, followlinks=True):
        kept = [f for f in sorted(folders) if f not in skipped and is_new(os.path.join(folder, f))]
        folders[:] = [f for f in kept if exclude is None or Path(folder, f).resolve() != exclude]
        # macOS puts metadata beside each file on foreign disks, as `._NAME`.
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files if not name.startswith("._")]
    return sorted(names)
