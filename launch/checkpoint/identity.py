"""What a run and its checkpoints belong to, and the one answer to "is this the same run?"."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from launch.nested import differing
from model import MoEGPTConfig

#: How the state lies over the ranks: another value means a conversion, not a refusal.
LAYOUT = ("world_size", "ep_size", "zero_stage", "dtype")
#: Of the samples: two fingerprints, which say nothing to a person.
CONTENT = "data.content"
#: The fields of a model that are ours. Those of transformers' base class come and go with its versions and say nothing about
#: the weights; whether generation uses a cache does not either.
MODEL_FIELDS = tuple(name for name in MoEGPTConfig.__annotations__ if name != "use_cache")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Values that JSON can hold. `conflicts` is what makes it another run, `conversions` what only lies differently."""

    model: dict[str, Any]
    data: Any = None
    sequence_length: int | None = None
    global_batch: int | None = None
    seed: int | None = None
    document_mask: bool | None = None
    world_size: int | None = None
    ep_size: int | None = None
    zero_stage: int | None = None
    dtype: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunIdentity:
        """Of what a `config.json` or `state.json` holds, which may be more."""
        known = {field.name for field in fields(cls)}
        return cls(**{"model": {}, **{name: value for name, value in values.items() if name in known}})

    def to_json(self) -> dict[str, Any]:
        """As it reads back: keys are strings, tuples are lists."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def conflicts(self, other: RunIdentity) -> list[str]:
        """What makes `other` another run, as `path: here -> there`. Empty: a run may go on from the one to the other."""
        found = []
        for difference in differences(self._essence(), other._essence()):
            if not difference.startswith(f"{CONTENT}:"):
                found.append(difference)
            elif self.sequence_length == other.sequence_length:
                # of another length the samples, whose the fingerprint is, differ by that alone
                found.append(f"{CONTENT}: other shards, weights or order of --data")
        return found

    def conversions(self, other: RunIdentity) -> list[str]:
        """What lies differently over the ranks, as `ep_size: 2 -> 4`."""
        return differences(self.layout(), other.layout())

    def layout(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LAYOUT}

    def _essence(self) -> dict[str, Any]:
        values = self.to_json()
        # A field that a model from before it does not have: as if it had been written with its default.
        model = {name: values["model"].get(name, getattr(MoEGPTConfig, name)) for name in MODEL_FIELDS}
        return {**{name: value for name, value in values.items() if name not in LAYOUT}, "model": model}


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two JSON values, as `path: old -> new`."""
    return [f"{name}: {json.dumps(before)} -> {json.dumps(after)}" for name, before, after in differing(old, new)]


def listed(found: list[str], most: int = 5) -> str:
    """The first few, and how many more there are."""
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")
