"""`state.json`: where a run was when it was saved, and what the checkpoint belongs to.

Written as part of a checkpoint, read back before anything is unpickled. A right checksum says that the bytes are those that were
written, not that they make sense (an older version, another program, a person with an editor): every value is checked here.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import read_json
from launch.checkpoint.identity import RunIdentity

STATE = "state.json"
STATE_FORMAT = 1
MOST = 1 << 53  # above any count, and the whole numbers that JSON holds exactly everywhere


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run is. `extra` is the caller's own, anything JSON can hold (floats survive exactly).

    `best_step`: whose evaluation `best_loss` is; None where there is none, or where an older version, which did not write it, had
    one. At 0 no checkpoint has it.
    """

    step: int
    samples: int
    tokens: int
    best_loss: float | None = None
    best_step: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """All of `state.json`. `optimizer`: what a conversion must know beforehand, see `universal.optimizer_facts`.

    `counted`: False where it was saved as a new best alone, which pushes none of the others out (`--keep_last`).
    """

    training: TrainingState
    identity: RunIdentity
    optimizer: dict[str, Any]
    counted: bool = True  # older versions, which did not write it, counted all

    def to_json(self) -> dict[str, Any]:
        about = {"identity": self.identity.to_json(), "optimizer": self.optimizer, "counted": self.counted}
        return {"format": STATE_FORMAT, **asdict(self.training), **about}


def read_state(checkpoint: Path) -> SavedState:
    """Of a checkpoint whose files are whole. Raises UserError that names the file and the value that makes no sense."""
    path = checkpoint / STATE
    try:
        body = read_json(path)
    except ValueError:
        raise UserError(f"{path} is not JSON, though its checksum is right; restore the checkpoint or move it away") from None
    if isinstance(body, dict) and isinstance(body.get("format"), int) and body["format"] > STATE_FORMAT:
        raise UserError(f"{path} has format {body['format']}, made by a newer version; this one reads {STATE_FORMAT}")
    wrong = _first_nonsense(body, checkpoint.name)
    if wrong:
        raise UserError(f"{path}: {wrong}; its checksum is right, so it was written so: restore the checkpoint or move it away")
    best, best_step = body.get("best_loss"), body.get("best_step")
    if best is None or not math.isfinite(best):  # NaN was kept as the best by older versions
        best, best_step = None, None
    training = TrainingState(
        **{name: body[name] for name in ("step", "samples", "tokens", "extra")}, best_loss=best, best_step=best_step
    )
    identity = RunIdentity.from_json(body["identity"])
    return SavedState(training=training, identity=identity, optimizer=body["optimizer"], counted=body.get("counted", True))


def _first_nonsense(body: Any, name: str) -> str:
    """What is wrong with the content, in words; empty where all is right."""
    if not isinstance(body, dict):
        return f"the top level must be an object, not {_shown(body)}"
    for key in ("step", "samples", "tokens"):
        if not _is_count(body.get(key)):
            return f"{key} must be a whole number from 0 up, not {_shown(body.get(key))}"
    if name.startswith("step_") and name != f"step_{body['step']}":
        return f"step is {body['step']} in a folder named {name}"
    batch = body["identity"].get("global_batch") if isinstance(body.get("identity"), dict) else None
    if _is_count(batch) and body["samples"] < body["step"] * batch:  # more are of steps that a rollback took back
        return f"samples is {body['samples']} at step {body['step']} of {batch} samples each"
    best = body.get("best_loss")
    if best is not None and not _is_number(best):
        return f"best_loss must be a number or null, not {_shown(best)}"
    best_step = body.get("best_step")
    if best_step is not None and not (_is_count(best_step) and best_step <= body["step"]):
        return f"best_step must be a step up to {body['step']} or null, not {_shown(best_step)}"
    for key in ("extra", "identity", "optimizer"):
        if not isinstance(body.get(key), dict):
            return f"{key} must be an object, not {_shown(body.get(key))}"
    if not isinstance(counted := body.get("counted", True), bool):
        return f"counted must be true or false, not {_shown(counted)}"
    if not isinstance(model := body["identity"].get("model", {}), dict):
        return f"identity.model must be an object, not {_shown(model)}"
    return _first_nonsense_of_the_optimizer(body["optimizer"])


def _first_nonsense_of_the_optimizer(facts: dict[str, Any]) -> str:
    rate: Any = facts.get("lr")
    if not _is_number(rate) or not math.isfinite(rate):
        return f"optimizer.lr must be a finite number, not {_shown(rate)}"
    for key in ("state", *(("parameters",) if "parameters" in facts else ())):
        names = facts.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"optimizer.{key} must be a list of names, not {_shown(names)}"
    return ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _is_number(value: object) -> bool:
    """Also NaN and infinity, which JSON does not know and Python writes; not a whole number that no float holds."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST)


def _shown(value: object) -> str:
    return json.dumps(value)[:80]
