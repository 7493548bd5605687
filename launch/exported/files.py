"""The files of an exported folder, as `launch/export.py` writes them or somebody else: what is recorded, whole and readable."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.cli import NotFound, UserError
from data.files import hash_file, is_inside, read_json, read_object, small_file
from data.pointers import pointer
from launch.manifest import HASH, MANIFEST, DamagedError, FileRecord, read_manifest

KIND = "export"  # in the manifest of an exported folder: only such a one may be replaced
POINTER_BYTES = 1024  # what git-LFS limits its own to
INDEX_BYTES = 1 << 28  # of an index: 100 bytes a weight


def refuse_pointer(path: Path) -> None:
    """Raises UserError where a clone without git-LFS has left a few lines in place of the file."""
    if path.stat().st_size <= POINTER_BYTES and (stands_for := pointer(small_file(path))):
        raise UserError(f"{path} is a {stands_for.name}: {stands_for.remedy}")


def check_weights(folder: Path) -> set[str]:
    """Size and checksum of weights and tokenizer, as the export wrote them; of any folder that its shards are there and readable.

    Returns the names of the weights by the headers of its safetensors files.
    The weights are then in memory for the reading that follows. Other files are the user's to edit.
    Raises UserError with the file that is damaged or missing.
    """
    for name, record in _recorded(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; export it again")
        refuse_pointer(path)
        if path.stat().st_size != record["bytes"] or hash_file(path, HASH) != record["xxh3_128"]:
            raise UserError(f"{path} is damaged: it is not the file that was exported; export it again")
    _check_shards(folder)
    names = _names_in_headers(folder)
    _check_generation(folder)
    return names


def weights_hash(folder: Path) -> str:
    """Of all weights of a folder that `load_exported` has just read: a later export has the same name.

    What the export recorded `check_weights` has found to be so; the weights of somebody else's folder are read for it.
    """
    recorded = _recorded(folder)
    paths = sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")))
    hashes = [(p.name, recorded[p.name]["xxh3_128"] if p.name in recorded else hash_file(p, HASH)) for p in paths]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def _recorded(folder: Path) -> dict[str, FileRecord]:
    """What `launch/export.py` recorded of weights and tokenizer; nothing for a folder of somebody else."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        if _is_another_programs(path):
            return {}
        raise UserError(f"{error}; export it again") from None
    files: dict[str, FileRecord] = manifest["files"] if manifest.get("kind") == KIND else {}
    return {name: record for name, record in files.items() if name.endswith(".safetensors") or name == "tokenizer.json"}


def _is_another_programs(path: Path) -> bool:
    found = read_object(path)
    return bool(found) and found.get("kind") != KIND and not {"format", "checksum"} & found.keys()


def _check_shards(folder: Path) -> None:
    """Whether a folder has the files that transformers will ask for: `model.safetensors`, or else those that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or any(folder.glob("pytorch_model*.bin*")):
        return
    if not index.is_file():
        raise NotFound(f"{folder} has no weights: neither model.safetensors nor {index.name}; copy or export it again")
    refuse_pointer(index)
    try:
        names = sorted(set(read_json(index, INDEX_BYTES)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights ({' '.join(str(error).split())[:100]}); copy it again") from None
    if not names or not all(is_inside(name) for name in names):
        raise UserError(f"{index} names no weights, or weights outside its folder; copy it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise NotFound(f"{folder} is incomplete: {missing[0]} is missing, {len(missing)} of {len(names)} shards are; copy it again")


def _check_generation(folder: Path) -> None:
    """transformers passes over a broken generation_config.json and fails on one that is JSON and no object."""
    path = folder / "generation_config.json"
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; mend or remove it")


def _names_in_headers(folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    names = set[str]()
    for path in sorted(folder.glob("*.safetensors")):
        refuse_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return names
