"""The folder `checkpoints/` of a run: which checkpoints it has, what its pointers name, in which order to try them, which may go.

    checkpoints/step_N/          DeepSpeed's files + buffers.pt + rng_R.pt per rank + state.json + manifest.json
    checkpoints/latest, best     text files that name a folder, replaced atomically
    checkpoints/resumed          the path of --resume where an earlier start began, so that the same command goes on
    checkpoints/left             names of steps of branches that were left: a start takes them only where --resume names them
    checkpoints/step_N.universal a conversion for another number of ranks, EP size, ZeRO stage or dtype; kept until the next save

Only names are looked at here; whether a checkpoint is whole says its manifest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.cli import UserError, counted
from data.files import make_folder, replace_file, small_file
from launch.words import gigabytes

LATEST, BEST, RESUMED, LEFT = "latest", "best", "resumed", "left"


def step_of(name: str) -> int | None:
    """42 for `step_42`; None for any other name."""
    match = re.fullmatch(r"step_(\d{1,18})", name)
    return int(match[1]) if match else None


def run_of(checkpoint: Path) -> Path:
    """The run's folder, wherever one stands (`step_4` is a path too), and also where `checkpoints` is a link to another disk."""
    return checkpoint.absolute().parent.parent


@dataclass(frozen=True)
class CheckpointFolder:
    """A run's, or one that a user names with `--resume`. It need not exist."""

    path: Path

    def check(self) -> None:
        """Nothing lies where a save will want to write, which could be days from now. Raises UserError that names it."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is no folder, so no checkpoint can be written there; move it away")
        for pointer in (self.path / name for name in (LATEST, BEST, RESUMED, LEFT)):
            if pointer.is_dir():
                raise UserError(f"{pointer} is a folder and must be a file that names one; move it away")
        if self.path.is_dir() and not os.access(self.path, os.W_OK):
            raise UserError(f"{self.path} cannot be written, so no checkpoint can be; change its permissions or remount it")

    def holds(self, checkpoint: Path) -> bool:
        """Is, or was, a checkpoint of that path one of this folder's, wherever one stands and whatever is a link?"""
        return self.path.is_dir() and checkpoint.parent.is_dir() and checkpoint.parent.samefile(self.path)

    def steps(self) -> dict[int, Path]:
        """The checkpoints by step, in no order."""
        if not self.path.is_dir():
            return {}
        found = {step_of(p.name): p for p in self.path.iterdir() if p.is_dir()}
        return {step: path for step, path in found.items() if step is not None}

    def present(self) -> dict[int, Path]:
        """Those of the branch that the run is on."""
        left = self.left()
        return {step: path for step, path in self.steps().items() if path.name not in left}

    def beyond(self, step: int) -> list[str]:
        return [path.name for other, path in self.steps().items() if other > step]

    def left(self) -> set[str]:
        """What `leave` was told."""
        try:
            return set(small_file(self.path / LEFT).decode(errors="replace").split())
        except FileNotFoundError:
            return set()

    def leave(self, names: Iterable[str], *, but: str) -> None:
        """Write down that `names` are of a branch that was left, and `but` is not. Once `latest` has passed such a step it would be
        kept in the place of one that was trained since, and gone on from where that one is damaged."""
        before, there = self.left(), {path.name for path in self.steps().values()}
        after = (before.union(names) & there) - {but}
        if after != before:
            replace_file(self.path / LEFT, "\n".join(sorted(after)).encode())

    def left_hint(self) -> str | None:
        """What a user should know of the disk space that nothing gives back; None where nothing was left."""
        left = self.left()
        names = [path.name for _, path in sorted(self.steps().items()) if path.name in left]
        if not names:
            return None
        size = 0
        with suppress(OSError):  # somebody may be deleting them
            for name in names:
                size += sum(file.stat().st_size for file in (self.path / name).rglob("*") if file.is_file())
        return (
            f"{self.path} holds {counted(len(names), 'checkpoint')} of branches that were left, {gigabytes(size)} that are never "
            f"deleted by themselves: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )

    def pointed(self, pointer: str) -> str | None:
        """What `latest` or `best` names; None where it is missing, empty or no checkpoint's name at all."""
        try:
            text = small_file(self.path / pointer).decode().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if step_of(text) is not None else None

    def gone(self) -> str | None:
        """What `latest` names and is not there, as behind a link to a disk that is not mounted."""
        named = self.pointed(LATEST)
        return None if named is None or step_of(named) in self.steps() else named

    def point(self, pointer: str, name: str) -> None:
        replace_file(self.path / pointer, name.encode())

    def set_best(self, name: str | None) -> None:
        if name is None:
            (self.path / BEST).unlink(missing_ok=True)
        elif name != self.pointed(BEST):
            self.point(BEST, name)

    def began_at(self) -> str | None:
        """The path that `begin_at` was told last; None where the last start named none."""
        try:
            return os.path.realpath(self.path / os.fsdecode(small_file(self.path / RESUMED)))
        except OSError:
            return None

    def begin_at(self, checkpoint: Path, place: str | None) -> None:
        """`checkpoint` has been loaded, as the one that the path `place` means: what lies beyond it is of a branch that was left.

        `left` comes first: what `latest` names is then passed over for the newest that was not left, which is `checkpoint`; and a
        start that finds no `resumed` begins there once more. Of a branch that is taken up again nobody knows which of the others it
        came by, so it goes on from that checkpoint alone.
        """
        if place is None:
            (self.path / RESUMED).unlink(missing_ok=True)
            return
        make_folder(self.path)
        if os.path.realpath(checkpoint) == place and self.holds(checkpoint):  # not where the same command goes on
            others = self.beyond(-1 if checkpoint.name in self.left() else step_of(checkpoint.name) or 0)
            self.leave(others, but=checkpoint.name)
            self.point(LATEST, checkpoint.name)
        own = Path(place).name if self.holds(Path(place)) else place  # the name is right wherever the run is moved to
        replace_file(self.path / RESUMED, os.fsencode(own))

    def newest_first(self) -> list[Path]:
        """The order to try: what `latest` names, then the steps before it, newest first, then those after it."""
        steps = self.present()
        pointed = step_of(self.pointed(LATEST) or "")
        newest = pointed if pointed is not None and pointed in steps else max(steps, default=0)
        return [steps[s] for s in sorted(steps, key=lambda s: (s > newest, -s))]

    def expendable(self, *, keep_last: int, keep_every: int, skipped: int = 0, of_bests: Collection[str] = ()) -> list[Path]:
        """Checkpoints that are no longer kept, and conversions: `latest` has moved past what they were made from.

        `skipped`: so many steps up to `latest` were; the newest from before them is what a rollback goes to.
        `of_bests`: names of those that were saved as a new best alone. They fill up what the others leave of `keep_last`: while
        there are few others, something is there to go back to where `latest` is damaged, and none of these is pushed out.
        """
        steps, latest = self.present(), self.pointed(LATEST)
        newest = step_of(latest or "")
        # What was left, or lies beyond `latest` and will be: not counted, not deleted.
        there = sorted((s for s in steps if newest is None or s <= newest), reverse=True)
        old = sorted(there, key=lambda s: f"step_{s}" in of_bests)[keep_last:] if keep_last else []
        before = [f"step_{s}" for s in there if newest is not None and s <= newest - skipped][:1]
        kept = {latest, self.pointed(BEST), *before} | {f"step_{s}" for s in old if keep_every and s % keep_every == 0}
        return [steps[s] for s in old if f"step_{s}" not in kept] + sorted(self.path.glob("step_*.universal"))
