"""Keys of the DeepSpeed JSON that nobody reads, without importing DeepSpeed: `engine/keys.py` asks it, which takes seconds.

Known are the keys of `ds_configs/`, each file of which is trained by a test, and those that `strategy.py` reads. The name of any
other is looked for in the sources of DeepSpeed and torch.optim: what stands nowhere in them is read by nobody. What is a word
there may be a key; it is doubted where it is near a known one ("fuse"), a known one of another section, or another system's name
for one. The rest, and sections that are not known, are left to training, which asks DeepSpeed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import read_json
from launch.engine.kinds import hint, unknown
from launch.engine.strategy import CONFIG_FOLDER, KINDS

#: Of how near a name is, from 0 to 1: two keys of DeepSpeed's are seldom nearer (reduce_ and allgather_bucket_size: 0.77).
DOUBTFUL = 0.8
#: As Megatron-LM, transformers' Trainer and torch call them, where DeepSpeed's sources have the word for something else.
ELSEWHERE = {
    "clip_grad": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "learning_rate": "optimizer.params.lr",
    "decay": "optimizer.params.weight_decay",
    "zero_stage": "zero_optimization.stage",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "global_batch_size": "train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
}


def check_unread(config: dict[str, Any], path: Path) -> list[str]:
    """Of an unresolved JSON; returns a sentence for each key that is doubted. Raises UserError, in training's words."""
    known, doubts = known_keys(), list[str]()
    others = [(section, key) for section, key in _keys(config, known) if key not in known[section]]
    nowhere = {key for _, key in others} - words_of_sources({key for _, key in others})
    for section, key in others:
        if key in nowhere:
            raise UserError(f"{path}: {unknown(section, key, known[section])}")
        whole = _dotted(section, key)
        if meant := _meant(section, key, known):
            doubts.append(f'{path}: no file of ds_configs/ has "{whole}"{meant} Training refuses it if DeepSpeed does not read it')
    return doubts


def _meant(section: str, key: str, known: dict[str, set[str]]) -> str:
    """As `hint`: of the same section, then of others."""
    if near := hint(key, known[section], cutoff=DOUBTFUL):
        return near
    places = [_dotted(other, key) for other in sorted(known) if key in known[other]]
    if places := [ELSEWHERE[key]] if key in ELSEWHERE else places[:1]:
        return f'; did you mean "{places[0]}"?'
    return ""


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def known_keys() -> dict[str, set[str]]:
    """By section; "" is the top level."""
    known: dict[str, set[str]] = {"": set()}
    for path in sorted(CONFIG_FOLDER.glob("*.json")):
        for section, key in _keys(read_json(path)):
            known.setdefault(section, set()).add(key)
    for dotted in KINDS:
        section, _, key = dotted.rpartition(".")
        known.setdefault(section, set()).add(key)
    return known


def _keys(config: dict[str, Any], sections: dict[str, set[str]] | None = None, name: str = "") -> Iterator[tuple[str, str]]:
    """(section, key) of every key; not inside of what is none of `sections`."""
    for key, value in config.items():
        yield name, key
        inner = _dotted(name, key)
        if isinstance(value, dict) and (sections is None or inner in sections):
            yield from _keys(value, sections, inner)


def words_of_sources(names: set[str]) -> set[str]:
    """Those of `names` that stand in DeepSpeed's or torch.optim's sources; all, where these are not there to be read."""
    left, folders = set(names), [_folder("deepspeed"), _folder("torch", "optim")]
    sources = [sorted(folder.rglob("*.py")) if folder else [] for folder in folders]
    if not all(sources):
        return set(names)
    for path in itertools.chain(*sources):
        if not left:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= {name for name in left if name in text and re.search(rf"\b{re.escape(name)}\b", text)}
    return names - left


def _folder(package: str, *inner: str) -> Path | None:
    spec = find_spec(package)  # of a top-level name: imports nothing
    return Path(spec.submodule_search_locations[0], *inner) if spec and spec.submodule_search_locations else None
