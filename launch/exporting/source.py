"""The checkpoint that an export reads: which one, whether it is whole, and its weights under the model's names."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.cli import NotFound, UserError, sentence
from data.files import read_json
from data.redact import redact
from launch import manifest
from launch.checkpoint.folder import BEST, LATEST, CheckpointFolder, run_of, step_of

if TYPE_CHECKING:
    from torch import Tensor

    from launch.checkpoint.identity import RunIdentity
    from model import MoEGPTConfig

# AutoEP's names and the model's; its experts are handled apart.
RENAMED = {".mlp.router.gate.weight": ".mlp.gate.weight", ".mlp.router.": ".mlp.gate."}


def find_checkpoint(path: Path, tag: str | None) -> Path:
    """The checkpoint folder that the command line means; of a run without a tag `latest`. Raises NotFound with what there is, and
    UserError where the path is a checkpoint itself and the tag another one."""
    if step_of(path.name) is not None and path.is_dir():
        if tag is not None and _named(path.parent, tag) != path.name:
            raise UserError(f"--checkpoint {path} and --tag {tag} do not name the same checkpoint; leave one out")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    named = _named(folder, LATEST if tag is None else tag)
    if step_of(named) is not None and (folder / named).is_dir():
        return folder / named
    steps = sorted(CheckpointFolder(folder).steps())
    if steps:
        there = f"it has {', '.join(f'step_{s}' for s in steps)}; name one with --tag"
    elif (path / "metrics.jsonl").is_file():
        there = "the run has saved none yet; see its --save_interval"
    else:
        there = "is it a run's folder?"
    raise NotFound(f"--checkpoint {path} has no checkpoint {named!r}: {there}")


def _named(folder: Path, tag: str) -> str:
    return (CheckpointFolder(folder).pointed(tag) if tag in (LATEST, BEST) else None) or tag


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Whatever fails once the checkpoint is gone failed by that: a run that goes on deletes its old ones. Raises NotFound."""
    try:
        yield
    except Exception as error:
        if checkpoint.is_dir():
            raise
        why = "its run goes on and keeps the newest alone (--keep_last)"
        raise NotFound(f"{checkpoint} was deleted while it was read: {why}; run the same command again") from error


def verify(checkpoint: Path) -> None:
    """Every checksum, before anything is unpickled. Raises DamagedError with the file's name."""
    files = manifest.read_manifest(checkpoint)["files"]
    manifest.check_listed(checkpoint, files)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        list(pool.map(lambda name: manifest.check_files(checkpoint, {name: files[name]}, [name]), files))


def model_config(checkpoint: Path) -> MoEGPTConfig:
    from launch.checkpoint.state import STATE, read_state
    from model import MoEGPTConfig

    manifest.read_manifest(checkpoint)  # a folder that was never completed is named as that
    identity = read_state(checkpoint).identity
    _check_run(checkpoint, identity)
    saved = identity.model
    try:
        return MoEGPTConfig.from_dict(redact(saved))  # a config.json of the user's may hold more than a model
    except (ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE}: identity.model is no model: {sentence(error)}") from error


def _check_run(checkpoint: Path, identity: RunIdentity) -> None:
    """Raises UserError where another run's checkpoint lies in this one, whose tokenizer it would be exported with."""
    from launch.checkpoint.identity import RunIdentity, listed

    config = run_of(checkpoint) / "config.json"
    try:
        run = RunIdentity.from_json(read_json(config))
    except (OSError, ValueError, TypeError, AttributeError):
        return  # a checkpoint that was taken out of its run, or whose run lost the file
    both_are_models = run.model and isinstance(run.model, dict) and isinstance(identity.model, dict)
    if both_are_models and (found := run.conflicts(identity)):
        raise UserError(f"{checkpoint} belongs to another run than {config}: {listed(found)}; name it where it was made")


def weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters (fp32) and buffers under the model's names: AutoEP's swap undone.

    Raises UserError with a weight that is not finite, or where the files hold something other than a checkpoint's content.
    """
    import torch

    from launch.checkpoint.finite import check_finite
    from launch.checkpoint.unpickle import expecting_sense
    from launch.checkpoint.weights import EXPERT_WEIGHT

    halves: dict[str, Tensor] = {}
    with expecting_sense(checkpoint):
        for name, value in _saved_weights(checkpoint):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}")
            check_finite({_model_name(name): value}, checkpoint)
            prefix, _, which = name.rpartition(".")
            if not EXPERT_WEIGHT.search(name):
                yield _model_name(name), value
            elif which == "w2":
                yield f"{prefix}.down_proj", value  # [E, H, I]
            else:
                halves[name] = value
                if {f"{prefix}.w1", f"{prefix}.w3"} <= halves.keys():
                    both = [halves.pop(f"{prefix}.{half}") for half in ("w1", "w3")]
                    yield f"{prefix}.gate_up_proj", torch.cat(both, dim=1)  # [E, 2I, H], gate above up
    if halves:
        raise UserError(f"{checkpoint}: {sorted(halves)[0]} has no other half")


def _saved_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    from launch.checkpoint.buffers import BUFFERS
    from launch.checkpoint.unpickle import load_file
    from launch.checkpoint.weights import master_weights

    yield from master_weights(checkpoint)
    yield from load_file(checkpoint / BUFFERS, mmap=False).items()


def _model_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name
