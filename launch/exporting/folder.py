"""The folder that an export writes: never half there, read back and compared before it gets its name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.cli import UserError
from data.files import read_json, replace_json
from data.lock import FolderLock, LockHeld
from data.terminal import say
from data.tokens import tokenizer as tokenizers
from data.tokens.folder import CONFIG, TOKENIZER
from launch import manifest
from launch.checkpoint.folder import run_of
from launch.checkpoint.publish import discard, leftovers, made_for, publish, working_name
from launch.exported.files import KIND
from launch.exporting.card import fim_rate, model_card
from launch.exporting.formats import CODE
from launch.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME_BYTES, WORKING_BYTES = 255, len(".tmp--") + 8  # of a file's name on Linux; of what `working_name` adds
HUB = Path(__file__).parent / "hub"


def check_output(output: Path) -> None:
    """Raises UserError where the output holds anything but an earlier export, or cannot be written under its name."""
    if not place_of(output).name:
        raise UserError(f"--output {output} is the root of the file system; name a folder")
    if len(os.fsencode(working_name(place_of(output), "tmp").name)) > NAME_BYTES:
        raise UserError(
            f"--output {output}: the name is too long by the {WORKING_BYTES} bytes of the name it is written under; shorten it"
        )
    try:
        str(place_of(output)).encode()
    except UnicodeEncodeError:
        raise UserError(f"--output {output}: safetensors writes only under names that are UTF-8; name another folder") from None
    if output.is_symlink() and not output.exists():
        raise UserError(f"--output {output} is a link to {os.readlink(output)}, which is not there; make that, or remove the link")
    check_writable(place_of(output).parent)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    if not any(output.iterdir()):
        return
    held, _ = manifest.find_manifest(output)
    if held is None or held.get("kind") != KIND:
        raise UserError(f"--output {output} holds something that is no earlier export; name a new or empty folder")


def place_of(output: Path) -> Path:
    """Where it lies: behind a link that leads to another disk, where it is to stay and not take the link's place."""
    return Path(os.path.realpath(output))


def check_writable(folder: Path) -> None:
    """Raises OSError where `folder`, or what is there of its path, takes no new entry: else it is said after all is read."""
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "this folder may not be written to", os.fspath(folder))


@contextmanager
def holding(output: Path) -> Iterator[None]:
    """Keep other exports from writing `output` meanwhile, by a lock beside it. Raises UserError while one does."""
    place = place_of(output)
    lock = FolderLock(place.parent, f".{place.name}.lock")
    try:
        lock.take()  # a file system without locks keeps nobody out
    except LockHeld as found:
        raise UserError(f"another export writes {output} ({found.holder}); wait for it, or name another --output") from None
    try:
        yield
    finally:
        (lock.folder / lock.name).unlink(missing_ok=True)
        lock.release()


def write(model: PreTrainedModel, checkpoint: Path, output: Path, *, max_shard_size: str) -> None:
    """Write, read back, compare, publish. A failure or a crash leaves no half an export under `output`'s name.

    The caller is `holding` it. Raises UserError where the disk is too full or a write fails.
    """
    from safetensors import SafetensorError

    place = place_of(output)
    _make_room(model, place)
    temporary = working_name(place, "tmp")
    try:
        _save(model, checkpoint, temporary, max_shard_size)
        _compare(model, temporary)
        for file in temporary.iterdir():  # safetensors writes for its owner's eyes alone
            shutil.copymode(checkpoint / "state.json", file)
        step = int(checkpoint.name.removeprefix("step_"))
        about = {
            "kind": KIND,
            "checkpoint": f"{run_of(checkpoint).name}/{checkpoint.name}",
            "step": step,
            "fim_rate": fim_rate(checkpoint),
        }
        manifest.write_manifest(temporary, manifest.record_all(temporary), **about)
        publish(temporary, place)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"writing {output} failed: {' '.join(str(error).split())}") from error
        raise


def _make_room(model: PreTrainedModel, output: Path) -> None:
    """Clear what dead exports of this name left. Raises UserError where the disk is too small."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for dead in leftovers(output.parent):
        if made_for(dead.name) == output.name:
            discard(dead)
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"--output {output} needs {needed / 1e9:,.3f} GB and the disk has {free / 1e9:,.3f} GB free")


def _save(model: PreTrainedModel, checkpoint: Path, folder: Path, max_shard_size: str) -> None:
    folder.mkdir(exist_ok=True)
    _copy_tokenizer(checkpoint, folder)
    _name_tokens(model, folder)
    set_generation(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if model.config.model_type == "moe_gpt":
        for name in CODE:
            shutil.copyfile(HUB / name, folder / name)
    (folder / "README.md").write_text(model_card(model, checkpoint), encoding="utf-8")


def set_generation(model: PreTrainedModel) -> None:
    """What `generate` and servers take where a caller says nothing: launch/generate.py's own defaults."""
    from transformers import GenerationConfig

    config = model.config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=Sampling.temperature,
        top_p=Sampling.top_p,
        top_k=Sampling.top_k,
        eos_token_id=config.eos_token_id,
        pad_token_id=end if config.pad_token_id is None else config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )


def _name_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Give the configuration the tokenizer's beginning and padding: where files of a folder disagree, transformers' Trainer warns.

    A padding that is the end of text as well stays out of it: transformers' embedding keeps the gradient from that row.
    """
    if not (folder / TOKENIZER).is_file() or not (folder / CONFIG).is_file():
        return
    settings, end = read_json(folder / CONFIG), model.config.eos_token_id
    tokenizer = tokenizers.library_tokenizer(str(folder / TOKENIZER), (folder / TOKENIZER).read_text(encoding="utf-8"))
    for name in ("bos_token", "pad_token"):
        token = settings.get(name)
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is not None and (name == "bos_token" or number not in (end if isinstance(end, list) else [end])):
            setattr(model.config, f"{name}_id", number)


def _copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    tokenizer = run_of(checkpoint) / "tokenizer"
    if not tokenizer.is_dir():
        say(f"warning: {tokenizer} is missing, so the export has no tokenizer")
        return
    for file in sorted(tokenizer.iterdir()):
        if file.is_file() and file.name not in ("config.json", "README.md"):
            shutil.copy2(file, folder)
    _complete_tokenizer(folder)


def _complete_tokenizer(folder: Path) -> None:
    """What runs of before 0.2 lack in theirs: see `data.tokens.tokenizer.save`."""
    vocabulary, config = folder / TOKENIZER, folder / CONFIG
    if not vocabulary.is_file() or not config.is_file():
        return
    text, settings = vocabulary.read_text(encoding="utf-8"), read_json(config)
    tokenizer = tokenizers.library_tokenizer(str(vocabulary), text)
    vocabulary.write_text(tokenizers.as_trained(text, tokenizer), encoding="utf-8")
    if "pad_token" not in settings and isinstance(end := settings.get("eos_token"), str):
        replace_json(config, settings | tokenizers.for_batches(tokenizer, end))


def check_shard_size(size: str) -> None:
    """Raises UserError where transformers would, after all weights are read."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError:
        raise UserError(f"--max_shard_size {size} must be a size such as 5GB or 500MB") from None


def _compare(model: PreTrainedModel, folder: Path) -> None:
    """Load the folder as a user would, and compare every weight to the bit. Raises UserError with one that differs."""
    import torch

    read = type(model).from_pretrained(folder, dtype=model.config.dtype, trust_remote_code=False)
    theirs = read.state_dict()
    for name, value in model.state_dict().items():
        # transformers reads some in fp32 whatever was asked for: the biases, and from 5.24 on the routers.
        read_in = (value.dtype, torch.float32)
        if theirs[name].dtype not in read_in or not torch.equal(theirs[name].to(value.dtype), value):
            raise UserError(f"{folder}: {name} reads back otherwise than it was written")
