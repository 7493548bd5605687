"""A key of the DeepSpeed JSON that nobody reads is a mistake, and trains something else without a word.

Which keys there are is DeepSpeed's to say. Its own configuration class is given a dict that notes what is asked for: whatever
stands in the file and was never asked for is unknown, and what was asked for is where the nearest right name comes from. Sections
that DeepSpeed holds in pydantic models refuse a key by themselves; optimizer and schedule are asked by their signatures.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, KeysView
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import BaseModel, ValidationError

from data.cli import UserError, sentence
from launch.engine import schedules
from launch.engine.kinds import another_kind, hint, shown, unknown
from launch.engine.refused import check_names_optimizer
from launch.engine.strategy import BATCH, Strategy
from launch.engine.values import SWITCHES, check_optimizer_values, check_values
from launch.nested import lookup

#: Held as a whole by DeepSpeed and handed to a class: checked by that class's signature.
SIGNATURES = ("optimizer.params", "scheduler.params")


class _Keys(KeysView[str]):
    """`name in section.keys()` asks for one key, which is how much of DeepSpeed reads; `**section` goes through all."""


class Section(dict[str, Any]):
    """A section of the JSON that notes which keys it is asked for, whether or not it has them, and what else would be taken."""

    def __init__(self, values: dict[str, Any], name: str, last_read: list[str]) -> None:
        super().__init__()
        self.name, self.asked, self._last_read, self._is_taken = name, set[str](), last_read, False
        self.defaults: dict[str, Any] = {}
        for key, value in values.items():
            inner = f"{name}.{key}" if name else key
            is_section = isinstance(value, dict) and inner not in SIGNATURES
            super().__setitem__(key, Section(value, inner, last_read) if is_section else value)

    def _note(self, key: object) -> None:
        self.asked.add(str(key))
        self._last_read[:] = self.name, f"{self.name}.{key}" if self.name else str(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        self.defaults[key] = default
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """As `get`: a copy of a section is the section itself, and must stay whole."""
        return self.get(key, *default)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        """Whoever takes all keys (`**section`) is a model that checks them by itself, and the sections in it."""
        self._is_taken = True
        self.asked.update(super().keys())
        self._last_read[0] = self.name
        return super().__iter__()

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return [(key, super(Section, self).__getitem__(key)) for key in self]

    def __copy__(self) -> Section:
        return self

    def __deepcopy__(self, memo: Any) -> Section:
        return self

    def of_another_kind(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, what it must be) where the default says true or false, or a number, and the value is none."""
        for key, value in super().items():
            if key in self.defaults and (wanted := another_kind(value, self.defaults[key])):
                yield f"{self.name}.{key}" if self.name else key, value, wanted
            elif isinstance(value, Section):
                yield from value.of_another_kind()

    def unread(self) -> Iterator[tuple[str, str, set[str]]]:
        """(section, key, names that are read there) of every key that nobody has asked for."""
        for key, value in super().items():
            if key not in self.asked:
                yield self.name, key, self.asked
            elif isinstance(value, Section) and not self._is_taken:
                yield from value.unread()


def check_keys(config: dict[str, Any], path: Path) -> None:
    """Every key of a resolved JSON, and its value. Raises UserError; for a key that nobody reads with the nearest right name."""
    _check_optimizer(config, path)
    _check_scheduler(config.get("scheduler"), path)
    last_read = ["", ""]
    # DeepSpeed checks their product against the ranks that it knows of, which have not joined yet; ours is checked already.
    batch = dict.fromkeys(BATCH, 1)
    recorder = Section({**config, **batch}, "", last_read)
    if isinstance(ours := dict.get(recorder, "activation_checkpointing"), Section):
        ours.asked.add("mode")  # see `without_our_keys`
    try:
        deepspeed_config.DeepSpeedConfig(recorder)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_complaint(error, last_read[0])}") from error
    except (ValueError, AssertionError, TypeError, deepspeed_config.DeepSpeedConfigError) as error:
        raise UserError(f"{path}: {sentence(error)}") from error
    except AttributeError as error:  # a text, a list where it goes on to ask a section
        wrong = shown(lookup(config, last_read[1]))
        raise UserError(f"{path}: {last_read[1]} must not be {wrong}: DeepSpeed expects a value of another kind") from error
    for key, value, wanted in recorder.of_another_kind():
        raise UserError(f"{path}: {key} must be {wanted}, not {shown(value)}")
    for section, key, known in recorder.unread():
        raise UserError(f"{path}: {unknown(section, key, known)}")
    check_values(config, path)


def _first_complaint(error: ValidationError, section: str) -> str:
    """Of a pydantic model that holds a section: an unknown key with the nearest of the model's own, else its message."""
    first = error.errors(include_url=False, include_input=False)[0]
    *outer, key = [str(part) for part in first["loc"]] or [""]
    where = ".".join([section, *outer]) if section else ".".join(outer)
    if first["type"] == "extra_forbidden":
        return unknown(where, key, _fields(error.title, outer))
    return f"{where}.{key}: {first['msg']}".replace("..", ".")


def _fields(model: str, inner: list[str]) -> set[str]:
    """The names that a model of DeepSpeed's takes, or the model that it holds under these fields."""
    found = next((each for each in _models(DeepSpeedConfigModel) if each.__name__ == model), None)
    for name in inner:
        annotation = found.model_fields[name].annotation if found is not None and name in found.model_fields else None
        choices = [annotation, *getattr(annotation, "__args__", ())]
        found = next((c for c in choices if inspect.isclass(c) and issubclass(c, BaseModel)), None)
    if found is None:
        return set()
    aliases = {str(field.alias) for field in found.model_fields.values() if field.alias}
    return {*found.model_fields, *aliases}


def _models(parent: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in parent.__subclasses__():
        yield child
        yield from _models(child)


def _check_optimizer(config: dict[str, Any], path: Path) -> None:
    check_names_optimizer(config, path)
    section = config["optimizer"]
    kind, params = str(section["type"]), dict(section.get("params") or {})
    accepted, takes = _accepted_by(kind, params, config)
    if accepted is None:
        named = {*deepspeed_config.DEEPSPEED_OPTIMIZERS, *(n for n in dir(torch.optim) if n[0].isupper())}
        raise UserError(f'{path}: optimizer.type "{kind}" is not an optimizer of DeepSpeed or torch.optim{hint(kind, named)}')
    for key in params:
        if key not in accepted:
            raise UserError(f"{path}: {unknown('optimizer.params', key, accepted)}")
    check_optimizer_values(kind, takes or torch.optim.AdamW, params, path)


def _accepted_by(kind: str, params: dict[str, Any], config: dict[str, Any]) -> tuple[set[str] | None, type | None]:
    """(what the optimizer that DeepSpeed would choose takes, its class); no names where there is no such optimizer."""
    name = kind.lower()
    if name in (deepspeed_config.ADAM_OPTIMIZER, deepspeed_config.ADAMW_OPTIMIZER, deepspeed_config.MUON_OPTIMIZER):
        left, engine = dict(params), _engine(config)
        left.pop(deepspeed_config.ADAM_W_MODE, None)
        chosen, _ = DeepSpeedEngine.get_optimizer_configuration(engine, left, True, allow_legacy_fallback=True)
        own = SWITCHES | params.keys() - left.keys()  # what DeepSpeed takes out for itself
        if name == deepspeed_config.MUON_OPTIMIZER:
            return {*own, *DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}, chosen
        return own | _parameters(chosen), chosen
    if name in deepspeed_config.DEEPSPEED_OPTIMIZERS:
        classes = [getattr(torch.optim, kind.capitalize(), None), *_deepspeed_classes(name)]
        found = [each for each in classes if each is not None]
        return set().union(*map(_parameters, found)) or set(params), found[0] if found else None
    chosen = getattr(torch.optim, kind, None)
    return (_parameters(chosen), chosen) if inspect.isclass(chosen) else (None, None)


def _engine(config: dict[str, Any]) -> Any:
    """What `get_optimizer_configuration` asks an engine."""
    return SimpleNamespace(
        zero_use_cpu_optimizer=lambda: Strategy.of(config).offloads_optimizer,
        bf16_optimizer_states=lambda: False,
        zenflow=bool(lookup(config, "zero_optimization.zenflow")),
        overlap_step=False,
    )


def _deepspeed_classes(name: str) -> list[Any]:
    """DeepSpeed's own classes for lamb, lion and adagrad; its others are not installed with it."""
    try:
        module = importlib.import_module(f"deepspeed.ops.{name}")
    except ImportError:
        return []
    return [value for key, value in vars(module).items() if inspect.isclass(value) and name in key.lower()]


def _check_scheduler(section: Any, path: Path) -> None:
    if not isinstance(section, dict):
        return
    kind = str(section.get("type"))
    chosen = schedules.find(kind)
    if chosen is None:
        names = [*schedules.NAMES, *(n for n in dir(torch.optim.lr_scheduler) if n[0].isupper())]
        raise UserError(f'{path}: scheduler.type "{kind}" is not a scheduler of this system, DeepSpeed or torch{hint(kind, names)}')
    accepted = _parameters(chosen)
    for key in section.get("params") or {}:
        if key not in accepted:
            raise UserError(f"{path}: {unknown('scheduler.params', key, accepted)}")


def _parameters(function: Any) -> set[str]:
    """Names that may be given; what is trained, or the optimizer of a schedule, comes first and is not among them."""
    return set(list(inspect.signature(function).parameters)[1:])
