"""A run's folder: `config.json`, and the refusal of a folder that holds another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import finite, read_json, replace_file, replace_json, small_file, sync_folder
from data.redact import redact
from data.terminal import say
from launch.checkpoint.folder import CheckpointFolder
from launch.checkpoint.identity import RunIdentity, differences, listed
from launch.engine.settings import missing_state
from launch.engine.strategy import settings_of_run
from launch.nested import lookup


def check_same_run(folder: Path, identity: RunIdentity) -> None:
    """Refuse a folder that holds another run. Raises UserError with the differences."""
    path = folder / "config.json"
    checkpoints = CheckpointFolder(folder / "checkpoints")
    if not _has_text(path) and checkpoints.steps():
        # Each checkpoint holds the run's identity as well, and is compared with it when it is chosen.
        say(f"warning: {path} is missing or empty; the run goes on from its checkpoints, and the file is written anew")
        return
    if not path.exists():
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if others:
            raise UserError(f"--output {folder} holds {others[0]!r} but no run; name a new or empty folder")
        return
    try:
        held = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); name another --output") from None
    if found := RunIdentity.from_json(held).conflicts(identity):
        raise UserError(f"--output {folder} holds another run: {listed(found)}; name another --output, or the run's own settings")


def changed_settings(folder: Path, deepspeed: dict[str, Any], *, deterministic: bool) -> list[str]:
    """How the DeepSpeed JSON differs from that of the run in `folder`, as `optimizer.params.lr: 0.001 -> 0.01`; and
    `deterministic`, without which GPUs round otherwise.

    Raises UserError for another optimizer, or one that keeps more: the state of one is not the other's.
    """
    try:
        config = read_json(folder / "config.json")
        held, was = settings_of_run(config), bool(lookup(config, "arguments.deterministic", False))
        before, now = held["optimizer"]["type"], deepspeed["optimizer"]["type"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a checkpoint that was taken out of its run
    or_begin_anew = "or start a new run from an export with --init_from"
    if str(before).lower() != str(now).lower():
        raise UserError(
            f"{folder} was trained with optimizer.type {before}, and {now}, which the JSON asks for, cannot go on from its state; "
            f"keep {before}, {or_begin_anew}"
        )
    params, wanted = (lookup(of, "optimizer.params") or {} for of in (held, deepspeed))
    if params != wanted and (missing := missing_state(now, params, wanted)) is not None:
        raise UserError(
            f"{folder} was trained with other optimizer.params ({listed(differences(params, wanted))}), and its state has no "
            f"{missing}, which those of the JSON need; leave them as they were, {or_begin_anew}"
        )
    return differences({**held, "--deterministic": was}, {**deepspeed, "--deterministic": deterministic})


def _has_text(path: Path) -> bool:
    """An empty file is what a power cut leaves of one that was not yet on the disk."""
    return path.exists() and bool(small_file(path).strip())


class FolderWatch:
    """Notices that the run's folder was deleted, moved away or replaced while the run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.folder.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def is_lost(self) -> bool:
        return self._identity() != self._known

    def begin_anew(self) -> None:
        """The folder that is there now is the run's."""
        self._known = self._identity()


def check_not_anothers(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError where the folder that stands in the place of a run's holds another run. `config`: of the run."""
    path = folder / "config.json"
    try:
        held = read_json(path) if path.exists() else None
    except ValueError:
        held = {}
    if held != json.loads(json.dumps(finite(redact(config)))) and (
        held is not None or CheckpointFolder(folder / "checkpoints").steps()
    ):
        raise UserError(f"{folder} was replaced by the folder of another run, which is not written over; move it away")


def write_config(folder: Path, config: dict[str, Any], tokenizer_folder: Path) -> None:
    """Publish `config.json` (atomically), then the tokenizer beside it: a folder that is visible without `config.json` is
    somebody else's to the next start."""
    final, copy = folder / "tokenizer", folder / ".tokenizer"
    missing = not final.exists()
    if missing:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in sorted(tokenizer_folder.iterdir()):  # not copytree, whose error is text about errors
            if file.is_file():
                replace_file(copy / file.name, small_file(file))
    replace_json(folder / "config.json", redact(config))
    if missing:
        copy.rename(final)
        sync_folder(folder)
