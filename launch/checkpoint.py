"""Checkpoints that are whole or refused: saving, choosing one to resume from, loading.

    checkpoints/step_N/          DeepSpeed's files + buffers.pt + rng_R.pt per rank + state.json + manifest.json
    checkpoints/latest, best     text files that name a folder, replaced atomically
    checkpoints/step_N.universal a conversion for another number of ranks, EP size, ZeRO stage or dtype; kept until the next save

A save goes to a hidden temporary folder; every file is checksummed and fsynced by the rank that writes it; the manifest comes
last; then the folder gets its name, then `latest` its content, and only then old checkpoints go. A crash at any moment leaves
`latest` naming a complete checkpoint. Resuming verifies every checksum, spread over the ranks, before anything is unpickled, and
all ranks load the same checkpoint or all refuse with the same sentence.

Checkpoints must lie where every rank sees them. They contain pickles: load none that you would not run.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch import integrity, universal
from launch.agreement import Agreement, Background
from launch.checkpoint_files import (
    BUFFERS,
    CheckpointFiles,
    going_through,
    persistent_buffers,
    random_state,
    restore_buffers,
    set_random_state,
)
from launch.distributed import AgreedError
from launch.integrity import FileRecord
from launch.run_folder import difference

STATE = "state.json"
STATE_FORMAT = 1
#: Top-level keys of `identity` that say how the state lies over the ranks: another value means a conversion, not a refusal.
LAYOUT = ("world_size", "ep_size", "zero_stage", "dtype")
#: Fields of a transformers config that say nothing about the weights; an upgrade of the library may change them.
INCIDENTAL = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache", "return_dict", "output_attentions")
SPACE_MARGIN = 1.05


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run is. `extra` is the caller's own, anything JSON can hold (floats survive exactly)."""

    step: int
    samples: int
    tokens: int
    best_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `find` decided, the same on every rank: start fresh (`path` is None) or resume from `path`.

    `conversions`: how the checkpoint's layout differs from this run's, as "ep_size: 2 -> 1"; empty for a plain load.
    """

    message: str
    path: Path | None = None
    state: TrainingState | None = None
    conversions: tuple[str, ...] = ()

    @property
    def resumes(self) -> bool:
        return self.path is not None

    def deepspeed_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed JSON to initialise the engine with: a converted checkpoint is announced there."""
        if not self.conversions:
            return config
        return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


class CheckpointManager:
    """The checkpoints of one run folder. Construction and every method are collective: all ranks call, in the same order.

    keep_last: newest checkpoints to keep (0: all). keep_every: also keep each at a multiple of this step (0: none). The newest
    and the best are always kept.
    identity: nested JSON dict of what a checkpoint belongs to (model, data, tokenizer, batch, seed). `find` refuses one that
    differs, except in the keys of `LAYOUT`, where it converts.
    background: `save` returns when the state is copied to host memory, and a thread writes it; call `wait` before the end.
    on_phase: told what is being done ("saving: ..."), for a watchdog.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        identity: dict[str, Any],
        background: bool = False,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = Path(run_folder) / "checkpoints"
        self.keep_last, self.keep_every = keep_last, keep_every
        self.identity = json.loads(json.dumps(identity))  # as it reads back: tuples are lists, keys are strings
        self.background, self._pending = background, None
        self._on_phase = on_phase
        self._ranks = Agreement()

    # ------------------------------------------------------------------ save

    def save(self, engine: Any, state: TrainingState, *, is_best: bool = False) -> Path:
        """Write `checkpoints/step_N`, point `latest` (and `best`) at it, then delete what is no longer kept.

        Errors, on all ranks alike and with every older checkpoint untouched: `ValueError` where the disk is too full or a
        write fails on any rank. In the background a failed write is an error of the next `save`, `find`, `load` or `wait`.
        """
        self.wait()
        final = self.folder / f"step_{state.step}"
        self._on_phase("saving: preparing")
        needed = sum(self._ranks.gather(universal.state_bytes(engine)))
        temporary = Path(self._ranks.on_first(lambda: self._prepare(final, needed)))
        files = CheckpointFiles(temporary, name=final.name, later=self.background)
        self._on_phase("saving: writing")
        self._write(engine, files, state)
        self._on_phase("saving: publishing")
        finish = partial(self._finish, files, final, is_best)
        if self.background:
            self._pending = Background(finish)
        else:
            finish()
        return final

    def written(self) -> bool:
        """Has this rank's part of a save in the background ended, so that `wait` returns at once (or raises)?"""
        return self._pending is not None and self._pending.done()

    def wait(self) -> None:
        """Return when no save is under way; raises what the last one in the background failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._on_phase("saving: waiting for the disk")
            pending.result()

    def _finish(self, files: CheckpointFiles, final: Path, is_best: bool) -> None:
        """From written on all ranks to published. Uses the control group alone, so that training may go on meanwhile."""
        files.flush()
        try:
            shares = self._ranks.on_all(files.records)
        except ValueError:
            self._ranks.on_first(lambda: integrity.discard(files.folder))
            raise
        records = {name: record for share in shares for name, record in share.items()}
        self._ranks.on_first(lambda: self._publish(files.folder, final, records, is_best))

    def _prepare(self, final: Path, needed: int) -> str:
        """Clean up after dead saves, check the free space, make the temporary folder; returns its path. Rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        integrity.recover(self.folder)
        for dead in integrity.leftovers(self.folder):
            integrity.discard(dead)
        free = shutil.disk_usage(self.folder).free
        if needed * SPACE_MARGIN > free:
            raise ValueError(
                f"{final.name} needs {needed * SPACE_MARGIN / 1e9:,.3f} GB and {self.folder} has {free / 1e9:,.3f} GB free; "
                "make room or lower --keep_last"
            )
        temporary = integrity.working_name(final, "tmp")
        temporary.mkdir()
        return str(temporary)

    def _write(self, engine: Any, writer: CheckpointFiles, state: TrainingState) -> None:
        """This rank's files. Nothing raises between DeepSpeed's barriers: the writer keeps the first error."""
        with going_through(writer, engine):
            engine.save_checkpoint(str(writer.folder), tag=".", save_latest=False)
        writer.save(random_state(), str(writer.folder / f"rng_{self._ranks.rank:05d}.pt"))
        if self._ranks.rank:
            return
        for script in writer.folder.glob("zero_to_*.py"):  # DeepSpeed's converter: launch/export.py is ours
            script.unlink()
        writer.save(persistent_buffers(engine.module), str(writer.folder / BUFFERS))
        body = {"format": STATE_FORMAT, **asdict(state), "identity": self.identity, "optimizer": universal.optimizer_facts(engine)}
        writer.write(STATE, integrity.to_json(body))

    def _publish(self, temporary: Path, final: Path, files: dict[str, FileRecord], is_best: bool) -> None:
        """Complete, name, point, clean up: in this order, each on the disk before the next begins. Rank 0."""
        strays = {p.name for p in temporary.iterdir()} - files.keys()
        assert not strays, f"written past the CheckpointFiles: {sorted(strays)}"
        integrity.write_manifest(temporary, files)
        integrity.publish(temporary, final)
        integrity.replace_file(self.folder / "latest", final.name.encode())
        if is_best:
            integrity.replace_file(self.folder / "best", final.name.encode())
        for old in self._expendable():
            integrity.discard(old)

    def _expendable(self) -> list[Path]:
        """Checkpoints that are no longer kept, and conversions: `latest` has moved past what they were made from."""
        latest, best = self._pointer("latest"), self._pointer("best")
        steps = self._steps()
        newest = max(steps) if latest is None else _step_of(latest)
        # A step beyond `latest` is of a branch that was left by resuming from an older one: not counted, not deleted.
        counted = sorted((s for s in steps if s <= newest), reverse=True)
        old = [] if not self.keep_last else counted[self.keep_last :]
        kept = {latest, best} | {f"step_{s}" for s in old if self.keep_every and s % self.keep_every == 0}
        return [steps[s] for s in old if f"step_{s}" not in kept] + sorted(self.folder.glob("step_*.universal"))

    # ------------------------------------------------------------------ find

    def find(self, resume: str) -> Verdict:
        """Choose what to start from; needs no engine. `resume`: "auto", "never", or a path to a checkpoint or a run.

        auto: the checkpoint `latest` names; where it is damaged (or `latest` is) the newest complete one before it, and the
        message names the damaged file. No checkpoint at all is a fresh start; checkpoints of which none is whole are refused.
        Errors: `ValueError` in one sentence, the same on all ranks.
        """
        self.wait()
        self._on_phase("choosing a checkpoint")
        if resume == "never":
            return self._ranks.on_first(self._start_over)
        if resume == "auto":
            return self._first_whole(self.folder, must_exist=False)
        path, is_one = self._ranks.on_first(lambda: self._resolve(resume))
        if not is_one:
            return self._first_whole(path, must_exist=True)
        verdict, damage = self._examine(path)
        if verdict is None:
            raise AgreedError(f"--resume {resume}: {damage}")
        return verdict

    def latest(self, *, before: float = math.inf) -> Verdict | None:
        """The newest whole checkpoint of this run at a step before that one, or None."""
        self.wait()
        candidates = self._ranks.on_first(lambda: self._newest_first(self.folder))
        return self._search([path for path in candidates if _step_of(path.name) < before])[0]

    def _start_over(self) -> Verdict:
        if self._steps():
            raise ValueError(
                f"--resume never, but {self.folder} holds {self._newest_first(self.folder)[0].name}; "
                "name another --output, or --resume auto to go on"
            )
        return Verdict(message="starting at step 0")

    def _resolve(self, resume: str) -> tuple[Path, bool]:
        """The checkpoint that a user's path means, or (with False) the folder that holds several. Rank 0."""
        path = Path(resume)
        for one in (path, self.folder / resume):
            if one.is_dir() and _step_of(one.name) is not None:
                return one, True
        for many in (path / "checkpoints", path):
            if many.is_dir() and self._steps(many):
                return many, False
        raise FileNotFoundError(f"--resume {resume}: no checkpoint there; name a run's folder or one of its checkpoints/step_N")

    def _first_whole(self, folder: Path, *, must_exist: bool) -> Verdict:
        """The first candidate in order that verifies, or a fresh start where there is none and need not be one."""
        verdict, passed_over = self._search(self._ranks.on_first(lambda: self._newest_first(folder)))
        if verdict is not None:
            notes = "".join(f"; passed over {text}" for text in passed_over)
            return replace(verdict, message=verdict.message + notes)
        if passed_over or must_exist:
            raise AgreedError(
                f"no whole checkpoint in {folder}: {'; '.join(passed_over)}; restore one, or name another --output to start over"
            )
        named = self._ranks.on_first(lambda: self._pointer("latest"))
        if named is not None:
            raise AgreedError(f"{folder / 'latest'} names {named!r}, which is gone; restore it, or delete the file to start over")
        return Verdict(message="starting at step 0")

    def _search(self, candidates: list[Path]) -> tuple[Verdict | None, list[str]]:
        """The first that verifies, and the damage of those before it; all ranks examine the same one at the same time."""
        passed_over: list[str] = []
        for candidate in candidates:
            verdict, damage = self._examine(candidate)
            if verdict is not None:
                return verdict, passed_over
            passed_over.append(damage)
        return None, passed_over

    def _newest_first(self, folder: Path) -> list[Path]:
        """The order to try: what `latest` names, then the steps before it, newest first, then those after it. Rank 0."""
        if not folder.is_dir():
            return []
        if folder == self.folder:
            integrity.recover(folder)
        steps = self._steps(folder)
        pointed = _step_of(self._pointer("latest", folder) or "")
        if pointed not in steps:
            pointed = max(steps, default=0)
        return [steps[s] for s in sorted(steps, key=lambda s: (s > pointed, -s))]

    def _examine(self, path: Path) -> tuple[Verdict | None, str]:
        """A verdict on one checkpoint, or what is damaged. Errors: `ValueError` where it is whole and does not belong here."""
        manifest, damage = self._ranks.on_first(lambda: integrity.attempt(lambda: integrity.read_manifest(path)))
        if not damage:
            files = manifest["files"]
            mine = integrity.share(files, self._ranks.rank, self._ranks.size)
            found = self._ranks.gather(integrity.attempt(lambda: integrity.check_files(path, files, mine))[1])
            damage = next(filter(None, found), "")
        return (None, damage) if damage else (self._ranks.on_first(lambda: self._judge(path)), "")

    def _judge(self, path: Path) -> Verdict:
        """Does a whole checkpoint belong to this run, and in this layout? Rank 0."""
        body = json.loads((path / STATE).read_bytes())
        if body["format"] > STATE_FORMAT:
            raise ValueError(f"{path / STATE} has format {body['format']}, made by a newer version; this one reads {STATE_FORMAT}")
        saved, own = body["identity"], self.identity
        wrong = difference(_essence(saved), _essence(own))
        if wrong:
            shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise ValueError(f"{path} belongs to another run: {shown}; name another --output, or the settings it was made with")
        layout = {key: saved.get(key) for key in LAYOUT}
        conversions = tuple(difference(layout, {key: own.get(key) for key in LAYOUT}))
        universal.check_convertible(path, layout, {key: own.get(key) for key in LAYOUT}, body["optimizer"])
        state = TrainingState(**{name: body[name] for name in TrainingState.__dataclass_fields__})
        message = f"resuming from {path} (step {state.step:,}, {state.samples:,} samples)"
        if conversions:
            message += f", converted from another layout ({', '.join(conversions)})"
        return Verdict(message=message, path=path, state=state, conversions=conversions)

    # ------------------------------------------------------------------ load

    def load(self, engine: Any, verdict: Verdict) -> TrainingState:
        """Restore the engine, the buffers and the random states from what `find` or `latest` verified.

        Errors, on all ranks alike: `ValueError` with DeepSpeed's or the file's complaint.
        """
        self.wait()
        assert verdict.path is not None and verdict.state is not None, "nothing to load: check verdict.resumes"
        source, converting = verdict.path, bool(verdict.conversions)
        folder = source
        if converting:
            self._on_phase("converting a checkpoint")
            folder = self.folder / f"{source.name}.universal"
            self._ranks.on_first(partial(universal.convert, source, folder, on_phase=self._on_phase))
        self._on_phase("loading a checkpoint")
        self._ranks.on_all(lambda: self._restore(engine, source, folder, verdict.state, converting))
        return verdict.state

    def _restore(self, engine: Any, source: Path, folder: Path, state: TrainingState, converting: bool) -> None:
        with _universal_loading(engine, converting), going_through(CheckpointFiles(folder, name=folder.name), engine):
            universal.load(engine, folder) if converting else _load_plainly(engine, folder)
        restore_buffers(engine.module, torch.load(source / BUFFERS, map_location="cpu", weights_only=True))
        own = source / f"rng_{self._ranks.rank:05d}.pt"
        if own.is_file():
            set_random_state(torch.load(own, map_location="cpu", weights_only=True))
        else:  # a rank that the saved run did not have: not the numbers of step 0 once more
            torch.manual_seed(torch.initial_seed() + state.step)

    # ------------------------------------------------------------------ the folder

    def _steps(self, folder: Path | None = None) -> dict[int, Path]:
        folder = folder or self.folder
        found = {_step_of(p.name): p for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else {}
        return {step: path for step, path in found.items() if step is not None}

    def _pointer(self, name: str, folder: Path | None = None) -> str | None:
        """What `latest` or `best` names; None where it is missing, empty or no name at all."""
        try:
            text = ((folder or self.folder) / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if _step_of(text) is not None else None


def _step_of(name: str) -> int | None:
    match = re.fullmatch(r"step_(\d+)", name)
    return int(match[1]) if match else None


def _essence(value: Any, top: bool = True) -> Any:
    """An identity without what may differ: the layout at its top, incidental fields at any depth."""
    if not isinstance(value, dict):
        return value
    return {k: _essence(v, False) for k, v in value.items() if k not in INCIDENTAL and not (top and k in LAYOUT)}


def _load_plainly(engine: Any, folder: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(folder), tag=".")
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder}")


@contextmanager
def _universal_loading(engine: Any, on: bool) -> Iterator[None]:
    """DeepSpeed reads this from the JSON once; an engine that started from a conversion may roll back to a plain one."""
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, on
    try:
        yield
    finally:
        config.load_universal_checkpoint = before
