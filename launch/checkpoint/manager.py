"""The checkpoints of one run: saving them whole, keeping the right ones, and handing over one to go on from.

A save goes to a hidden temporary folder; every file is checksummed and fsynced by the rank that writes it; the manifest comes
last; then the folder gets its name, then `left`, `best` and `latest` their content, and only then old checkpoints go. A crash at
any moment leaves `latest` naming a complete checkpoint, and `best` none that is worse than that one's best loss. `choose` says what
to resume from, `restore` loads it.

Checkpoints must lie where every rank sees them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from deepspeed.runtime.engine import DeepSpeedEngine

from data.cli import UserError, sentence
from data.files import make_folder
from data.terminal import say
from launch.checkpoint import universal
from launch.checkpoint.buffers import BUFFERS, persistent_buffers
from launch.checkpoint.choose import CheckpointChooser, ResumeChoice, ResumeFrom
from launch.checkpoint.engine_files import CheckpointFiles, going_through, state_bytes
from launch.checkpoint.folder import BEST, LATEST, CheckpointFolder
from launch.checkpoint.identity import RunIdentity
from launch.checkpoint.publish import discard, leftovers, publish, recover, working_name
from launch.checkpoint.random_state import random_state
from launch.checkpoint.restore import random_state_name, restore
from launch.checkpoint.state import STATE, SavedState, TrainingState, read_state
from launch.cli import AgreedError
from launch.manifest import FileRecord, to_json, write_manifest
from launch.ranks.control_group import ControlGroup

T = TypeVar("T")
SPACE_MARGIN = 1.05
#: How often a waiting rank looks whether the files that are written in the background grow.
LOOK_SECONDS = 1.0


class CheckpointManager:
    """The checkpoints of one run folder. Construction and every method are collective: all ranks call, in the same order.

    keep_last: newest checkpoints to keep (0: all), those of a new best alone after the others. keep_every: also keep each at a
    multiple of this step (0: none). The newest and the best are always kept.
    identity: what a checkpoint belongs to. `choose` refuses one that belongs to another run, and converts one of another layout.
    background: `save` returns when the state is copied to host memory, and a thread writes it; call `wait` before the end.
    on_phase: told what is being done ("saving: ..."), for a watchdog.
    The attribute `before_save` is run on rank 0 before anything is written, such as a look whether the run's folder is still there.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        identity: RunIdentity,
        background: bool = False,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = CheckpointFolder(Path(run_folder) / "checkpoints")
        self.keep_last, self.keep_every = keep_last, keep_every
        self.identity = identity
        self.background = background
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")  # an exit waits for the files
        self._pending: tuple[Future[None], CheckpointFiles] | None = None
        self._loaded = False  # and nothing saved since
        self._best: str | None = None  # the best checkpoint up to the step that was loaded
        self._beyond: list[str] = []  # names of what lay beyond that step: of a branch that is left with the first save
        self._on_phase = on_phase
        self.before_save: Callable[[], None] = lambda: None
        self._ranks = ControlGroup()
        self._chooser = CheckpointChooser(self.folder, identity, self._ranks, partial(on_phase, "choosing a checkpoint"))

    def save(
        self, engine: DeepSpeedEngine, state: TrainingState, *, is_best: bool = False, counted: bool = True, skipped: int = 0
    ) -> Path:
        """Write `checkpoints/step_N`, point `latest` (and `best`) at it, then delete what is no longer kept. `counted`: it would be
        saved were it not the best. `skipped`: so many steps in a row up to this one were, and what was saved before them is kept
        for a rollback.

        Raises AgreedError, on all ranks alike and with every older checkpoint untouched, where the disk is too full or a
        write fails on any rank. In the background a failed write is an error of the next `save`, `choose`, `load` or `wait`.
        """
        self.wait()
        final = self.folder.path / f"step_{state.step}"
        self._on_phase("saving: preparing")
        needed = sum(self._ranks.gather(state_bytes(engine)))
        temporary = self._on_rank0(lambda: self._prepare(final, needed))
        writing = partial(self._on_phase, "saving: writing")
        files = CheckpointFiles(temporary, name=final.name, later=self.background, on_part=writing)
        writing()
        self._write(engine, files, state, counted)
        self._on_phase("saving: publishing")
        finish = partial(self._finish, files, final, is_best, skipped)
        if self.background:
            self._pending = self._writer.submit(finish), files
        else:
            finish()
        return final

    def written(self) -> bool:
        """Has this rank's part of a save in the background ended, so that `wait` returns at once (or raises)?"""
        return self._pending is not None and self._pending[0].done()

    def wait(self) -> None:
        """Return when no save is under way; raises what the last one in the background failed with."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        future, files = pending
        waiting = partial(self._on_phase, "saving: waiting for the disk")
        waiting()
        parts = files.parts
        while not wait_for((future,), timeout=LOOK_SECONDS).done:
            if files.parts != parts:  # a disk that is slow, and not one that hangs
                parts = files.parts
                waiting()
        future.result()

    def choose(self, resume: str) -> ResumeChoice:
        """What to start from; needs no engine. See `CheckpointChooser.choose`."""
        self.wait()
        self._on_phase("choosing a checkpoint")
        self._on_rank0(self._tidy)
        return self._chooser.choose(resume)

    def newest(self, *, before: float = math.inf) -> ResumeFrom | None:
        """The newest whole checkpoint of this run at a step before that one, or None."""
        self.wait()
        self._on_phase("choosing a checkpoint")
        self._on_rank0(self._tidy)
        return self._chooser.newest(before=before)

    def load(self, engine: DeepSpeedEngine, choice: ResumeFrom) -> TrainingState:
        """Restore the engine, the buffers and the random states from what `choose` or `newest` verified.

        Raises AgreedError, on all ranks alike, with what cannot be used.
        """
        self.wait()
        folder = choice.path
        if choice.conversions:
            self._on_phase("converting a checkpoint")
            folder = self.folder.path / f"{choice.path.name}.universal"
            self._ranks.run_on_rank0(partial(universal.convert, choice.path, folder, on_phase=self._on_phase))
        loading = partial(self._on_phase, "loading a checkpoint")
        loading()
        self._ranks.run_everywhere(partial(restore, engine, choice, folder, self._ranks, loading))
        self._loaded = True
        self._beyond, self._best = self._ranks.run_on_rank0(
            lambda: (self.folder.beyond(choice.state.step), self._best_of_branch(choice))
        )
        if self._best or choice.state.best_step == 0:
            return choice.state
        # Nothing in this folder has the loss that the next evaluations would have to be better than.
        return replace(choice.state, best_loss=None, best_step=None)

    def begin(self, choice: ResumeFrom) -> None:
        """A run has loaded what it starts from: what lies beyond that is of a branch that was left."""

        def on_rank0() -> None:
            self.folder.begin_at(choice.path, choice.place)
            self.folder.set_best(self._best)

        self._ranks.run_on_rank0(on_rank0)

    def left_hint(self) -> str | None:
        """What a user should know whose folder holds branches that were left; None where it holds none."""
        return self._ranks.run_on_rank0(self.folder.left_hint)

    def _best_of_branch(self, choice: ResumeFrom) -> str | None:
        """The best checkpoint up to what was loaded: `best` may name one of a branch that is being left. Rank 0."""
        loaded = choice.state
        if loaded.best_step is None:
            return self._best_by_its_loss(choice)
        path = self.folder.steps().get(loaded.best_step)  # also where it was left: it may be of the branch that is taken up again
        return path.name if path and has_best_loss(path, loaded.best_loss) else None  # else another branch saved that step since

    def _best_by_its_loss(self, choice: ResumeFrom) -> str | None:
        """The same where an older version did not write whose the best loss is: what `best` names, else the first that has it."""
        loaded, named = choice.state, self.folder.pointed(BEST)
        there = {step: path for step, path in self.folder.present().items() if step <= loaded.step}
        if choice.is_own:
            there[loaded.step] = choice.path  # it may be of a branch that was left, and is taken up again
        paths = sorted((there[step] for step in sorted(there)), key=lambda path: path.name != named)
        if loaded.best_loss is None:
            return named if paths and paths[0].name == named else None
        return next((path.name for path in paths if has_best_loss(path, loaded.best_loss)), None)

    def _on_rank0(self, action: Callable[[], T]) -> T:
        """As `ControlGroup.run_on_rank0`; whatever the disk's error, it is none of the program's."""

        def attempt() -> T:
            try:
                return action()
            except OSError as error:
                raise UserError(sentence(error)) from error

        return self._ranks.run_on_rank0(attempt)

    def _tidy(self) -> None:
        """Put the folder right after processes that died: the run's lock is held, so none that lives writes there. Rank 0."""
        if self.folder.path.is_dir():
            recover(self.folder.path)
            for dead in leftovers(self.folder.path):
                remove(dead)

    def _prepare(self, final: Path, needed: int) -> Path:
        """Clean up after dead saves, check the free space, make the temporary folder. Rank 0."""
        self.before_save()
        folder = self.folder.path
        make_folder(folder)
        self._tidy()
        free, left = shutil.disk_usage(folder).free, sorted(self.folder.left())
        if needed * SPACE_MARGIN > free:
            of_left = f" ({', '.join(left)}: of branches that were left)" if left else ""
            raise UserError(
                f"{final.name} needs {needed * SPACE_MARGIN / 1e9:,.3f} GB and {folder} has {free / 1e9:,.3f} GB free; "
                f"make room{of_left} or lower --keep_last"
            )
        temporary = working_name(final, "tmp")
        temporary.mkdir()
        return temporary

    def _write(self, engine: DeepSpeedEngine, files: CheckpointFiles, state: TrainingState, counted: bool) -> None:
        """This rank's files. Nothing raises between DeepSpeed's barriers: `files` keeps the first error."""
        with going_through(files, engine):
            engine.save_checkpoint(str(files.folder), tag=".", save_latest=False)
        files.save(random_state(), str(files.folder / random_state_name(self._ranks.rank)))
        if self._ranks.rank:
            return
        files.save(persistent_buffers(engine.module), str(files.folder / BUFFERS))
        facts = universal.optimizer_facts(engine)
        saved = SavedState(training=state, identity=self.identity, optimizer=facts, counted=counted)
        files.write(STATE, to_json(saved.to_json()))

    def _finish(self, files: CheckpointFiles, final: Path, is_best: bool, skipped: int) -> None:
        """Gather the records of all ranks and publish. Uses the control group alone, so that training may go on meanwhile."""
        try:
            shares = self._ranks.run_everywhere(files.flush)
        except AgreedError:  # a full disk; after a fault of the program nothing more is agreed on
            self._ranks.run_on_rank0(lambda: discard(files.folder))
            raise
        records = {name: record for share in shares for name, record in share.items()}
        self._on_rank0(lambda: self._publish(files.folder, final, records, is_best, skipped))

    def _publish(self, temporary: Path, final: Path, files: dict[str, FileRecord], is_best: bool, skipped: int) -> None:
        """Complete, name, point, clean up: in this order, each on the disk before the next begins. Rank 0."""
        strays = {p.name for p in temporary.iterdir()} - files.keys()
        assert not strays, f"written past the CheckpointFiles: {sorted(strays)}"
        write_manifest(temporary, files)
        if not is_best and final.name in self.folder.left().union(self._beyond) and final.name == self.folder.pointed(BEST):
            self.folder.set_best(None)  # it is about to be replaced by one that is not
        publish(temporary, final)
        self._beyond = [name for name in self._beyond if name != final.name]
        # Not as soon as it is loaded: until there is something newer, what was damaged may still be restored and gone on from.
        self.folder.leave(self._beyond, but=final.name)
        if is_best:  # before `latest`, which a run goes on from, with its best loss: nothing worse than that is saved as the best
            self.folder.set_best(final.name)
        self.folder.point(LATEST, final.name)
        if self._loaded and not is_best:
            self.folder.set_best(self._best)
        self._loaded, self._beyond = False, []
        of_bests = {path.name for path in self.folder.present().values() if not is_counted(path)}
        last, every = self.keep_last, self.keep_every
        for old in self.folder.expendable(keep_last=last, keep_every=every, skipped=skipped, of_bests=of_bests):
            remove(old)


def remove(folder: Path) -> None:
    """Of what is no longer kept; the save that it was kept for is complete, and does not fail where this does."""
    try:
        discard(folder)
    except OSError as error:  # it is mounted, or somebody else's
        say(f"warning: {folder} is no longer kept and cannot be deleted ({error.strerror or error})")


def is_counted(path: Path) -> bool:
    """Is that checkpoint, which need not be whole, more than a new best?"""
    with suppress(OSError, ValueError):
        return read_state(path).counted
    return True


def has_best_loss(path: Path, loss: float | None) -> bool:
    """Is that the best loss up to a checkpoint, which need not be whole?"""
    with suppress(OSError, ValueError):
        return read_state(path).training.best_loss == loss
    return False
