"""What a run starts from: nothing, or the newest checkpoint that is whole and belongs to it.

Every checksum is verified, spread over the ranks, before anything is unpickled, and all ranks choose the same checkpoint or all
refuse with the same sentence.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from launch.checkpoint import universal
from launch.checkpoint.folder import LATEST, RESUMED, CheckpointFolder, step_of
from launch.checkpoint.identity import RunIdentity, listed
from launch.checkpoint.state import TrainingState, read_state
from launch.cli import AgreedError
from launch.manifest import find_manifest, first_damage, share
from launch.ranks.control_group import ControlGroup


@dataclass(frozen=True, kw_only=True)
class StartFresh:
    """There is nothing to resume from, and need not be."""

    message: str = "starting at step 0"

    def deepspeed_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed JSON to initialise the engine with."""
        return config


@dataclass(frozen=True, kw_only=True)
class ResumeFrom:
    """A checkpoint that is whole and belongs to this run.

    `conversions`: how its layout differs from this run's, as "ep_size: 2 -> 1"; empty for a plain load.
    `is_own`: it lies in this run's folder; from another's, this run goes on under a name of its own.
    `place`: the path that `--resume` named, absolute; None where it named none. See `CheckpointFolder.begin_at`.
    """

    message: str
    path: Path
    state: TrainingState
    conversions: tuple[str, ...] = ()
    is_own: bool = True
    place: str | None = None

    def deepspeed_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed JSON to initialise the engine with: a converted checkpoint is announced there."""
        if not self.conversions:
            return config
        return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


ResumeChoice = StartFresh | ResumeFrom


@dataclass(frozen=True, kw_only=True)
class _Meant:
    """By a path of `--resume`: one checkpoint, or the first whole one of a folder. `remark` goes into the choice's message."""

    folder: CheckpointFolder
    place: str | None
    one: Path | None = None
    remark: str = ""


class CheckpointChooser:
    """Chooses for one run; every method that is not private is collective. `on_read`: called as files are read, for a watchdog."""

    def __init__(
        self, own: CheckpointFolder, identity: RunIdentity, ranks: ControlGroup, on_read: Callable[[], object] = lambda: None
    ) -> None:
        self.own, self.identity, self.ranks, self.on_read = own, identity, ranks, on_read

    def choose(self, resume: str) -> ResumeChoice:
        """`resume`: "auto", "never", or a path to a checkpoint or a run.

        auto: the checkpoint `latest` names; where it is damaged (or `latest` is) the newest complete one before it, and the
        message names the damaged file. No checkpoint at all is a fresh start; checkpoints of which none is whole are refused.
        A path is where a run begins: the same command once more goes on as auto does, for a job that is queued again repeats it.
        Raises AgreedError in one sentence, the same on all ranks.
        """
        self.ranks.run_on_rank0(self.own.check)
        if resume == "never":
            return self.ranks.run_on_rank0(self._start_over)
        if resume == "auto":
            return self._first_whole(self.own, must_exist=False)
        meant = self.ranks.run_on_rank0(lambda: self._resolve(resume))
        choice: ResumeChoice | None
        choice, damage = self._examine(meant.one) if meant.one else (self._first_whole(meant.folder, must_exist=True), "")
        if not isinstance(choice, ResumeFrom):
            raise AgreedError(f"--resume {resume}: {damage}")
        return replace(choice, message=choice.message + meant.remark, place=meant.place)

    def newest(self, *, before: float) -> ResumeFrom | None:
        """The newest whole checkpoint of this run at a step before that one, or None."""
        last = self.ranks.run_on_rank0(lambda: step_of(self.own.pointed(LATEST) or ""))
        before = before if last is None else min(before, last + 1)  # what lies beyond is of a branch that was left
        candidates = self.ranks.run_on_rank0(self.own.newest_first)
        return self._search([path for path in candidates if (step_of(path.name) or 0) < before])[0]

    def _start_over(self) -> StartFresh:
        there = self.own.newest_first() or list(self.own.steps().values())  # what was left is not to be written over either
        if there:
            raise UserError(
                f"--resume never, but {self.own.path} holds {there[0].name}; name another --output, or --resume auto to go on"
            )
        return StartFresh()

    def _resolve(self, resume: str) -> _Meant:
        """The checkpoint that a user's path means, or the folder that holds several: this run's own where it began there before, or
        where it lies in another run and this one has checkpoints already. Rank 0."""
        path, begun = Path(resume), bool(self.own.steps())
        places = [os.path.realpath(one) for one in (path, self.own.path / resume)]
        if begun and (before := self.own.began_at()) in places:  # it may be gone since
            remark = f"; an earlier start began at --resume {resume} (to begin there again, delete {self.own.path / RESUMED})"
            return _Meant(folder=self.own, place=before, remark=remark)
        meant = self._find(resume)
        if begun and not self.own.holds(meant.one or meant.folder.path / LATEST):
            remark = f"; {self.own.path} has checkpoints of its own (to begin at --resume {resume}, name another --output)"
            return _Meant(folder=self.own, place=meant.place, remark=remark)
        return meant

    def _find(self, resume: str) -> _Meant:
        path = Path(resume)
        for one in (path, self.own.path / resume):
            if one.is_dir() and step_of(one.name) is not None:
                return _Meant(one=one, folder=CheckpointFolder(one.parent), place=os.path.realpath(one))
        for several in (CheckpointFolder(path / "checkpoints"), CheckpointFolder(path)):
            if several.steps():
                is_own = self.own.holds(several.path / LATEST)  # its own newest, as with auto
                return _Meant(folder=several, place=None if is_own else os.path.realpath(path))
        raise NotFound(f"--resume {resume}: no checkpoint there; name a run's folder or one of its checkpoints/step_N")

    def _first_whole(self, folder: CheckpointFolder, *, must_exist: bool) -> ResumeChoice:
        """The first candidate in order that verifies, or a fresh start where there is none and need not be one."""
        choice, passed_over = self._search(self.ranks.run_on_rank0(folder.newest_first))
        gone = self.ranks.run_on_rank0(folder.gone)
        if choice is not None:
            remarks = [f"passed over {text}" for text in passed_over] + [f"{LATEST} names {gone}, which is gone"] * bool(gone)
            return replace(choice, message="; ".join([choice.message, *remarks]))
        left = self.ranks.run_on_rank0(lambda: ", ".join(sorted(folder.left())))
        if passed_over or must_exist or left:
            others = f"; {left} are of branches that were left, for --resume to name" if left else ""
            raise AgreedError(
                f"no whole checkpoint in {folder.path}{': ' * bool(passed_over)}{'; '.join(passed_over)}{others}; "
                "restore one, or name another --output to start over"
            )
        if gone is not None:
            raise AgreedError(f"{folder.path / LATEST} names {gone!r}, which is gone; restore it, or delete the file to start over")
        return StartFresh()

    def _search(self, candidates: list[Path]) -> tuple[ResumeFrom | None, list[str]]:
        """The first that verifies, and the damage of those before it; all ranks examine the same one at the same time."""
        passed_over: list[str] = []
        for candidate in candidates:
            choice, damage = self._examine(candidate)
            if choice is not None:
                return choice, passed_over
            passed_over.append(damage)
        return None, passed_over

    def _examine(self, path: Path) -> tuple[ResumeFrom | None, str]:
        """A checkpoint to resume from, or what is damaged. Raises AgreedError where it is whole and does not belong here."""
        damage = self._first_damage(path)
        if damage:
            return None, damage
        return self.ranks.run_on_rank0(lambda: self._accept(path)), ""

    def _first_damage(self, path: Path) -> str:
        """What is damaged in a checkpoint, in words; every rank hashes its share. Empty: it is whole."""
        manifest, damage = self.ranks.run_on_rank0(lambda: find_manifest(path))
        if manifest is None:
            return damage
        files = manifest["files"]
        mine = share(files, self.ranks.rank, self.ranks.size)
        found = self.ranks.run_everywhere(lambda: first_damage(path, files, mine, self.on_read))
        return next(filter(None, found), "")

    def _accept(self, path: Path) -> ResumeFrom:
        """Does a whole checkpoint belong to this run, and in this layout? Rank 0. Raises UserError where not."""
        if glob.escape(str(path.absolute())) != str(path.absolute()):
            raise UserError(f"{path}: DeepSpeed takes [, * and ? in a path for a pattern and could not load it; rename the folder")
        saved = read_state(path)
        wrong = saved.identity.conflicts(self.identity)
        if wrong:
            raise UserError(
                f"{path} belongs to another run: {listed(wrong)}; name another --output, or the settings it was made with"
            )
        conversions = tuple(saved.identity.conversions(self.identity))
        universal.check_convertible(path, saved.identity.layout(), self.identity.layout(), saved.optimizer)
        message = f"resuming from {path} (step {saved.training.step:,}, {saved.training.samples:,} samples)"
        if conversions:
            message += f", converted from another layout ({', '.join(conversions)})"
        return ResumeFrom(message=message, path=path, state=saved.training, conversions=conversions, is_own=self.own.holds(path))
