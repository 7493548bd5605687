"""What the settings of runs differ in, and the settings worth a place at the top."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from launch.nested import leaves, lookup
from launch.reporting.read import Run

#: Differ between any two runs and explain nothing.
NOISE = ("arguments.output", "command", "host", "data.content")
MISSING = "not set"


def settings_that_differ(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run), for settings that are not the same everywhere. All of `runs` have a configuration."""
    flat = [{name: json.dumps(value) for name, value in leaves(run.config)} for run in runs]
    names = sorted({name for settings in flat for name in settings if not name.startswith(NOISE)})
    rows = [(name, [settings.get(name, MISSING) for settings in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def settings_in_short(run: Run) -> list[tuple[str, str]]:
    """The few settings that a reader asks for first."""
    config = run.config
    pairs = [
        ("Model", _model(config)),
        ("Layers", lookup(config, "model.num_hidden_layers")),
        ("Hidden size", lookup(config, "model.hidden_size")),
        ("Experts", _experts(config)),
        ("Balance", _balance(config)),
        ("Context", lookup(config, "sequence_length")),
        ("Global batch", lookup(config, "global_batch")),
        ("Optimizer", lookup(config, "deepspeed.optimizer.type")),
        ("Peak learning rate", lookup(config, "deepspeed.optimizer.params.lr")),
        ("Precision", lookup(config, "dtype")),
        ("Ranks", lookup(config, "world_size")),
        ("Expert parallel", lookup(config, "ep_size")),
        ("ZeRO stage", lookup(config, "zero_stage")),
        ("Seed", lookup(config, "seed")),
        ("Commit", str(lookup(config, "git_commit") or "")[:12] or None),
        ("Host", lookup(config, "host")),
    ]
    return [(name, str(value)) for name, value in pairs if value is not None]


def _model(config: dict[str, Any]) -> str | None:
    """A preset's name, or of a path what tells it from others: `.../big_model/config.json` is `big_model`."""
    name = lookup(config, "arguments.model")
    if not isinstance(name, str):
        return None
    path = PurePath(name)
    return path.parent.name if path.name == "config.json" and path.parent.name else path.name


def _experts(config: dict[str, Any]) -> str | None:
    experts, top_k = lookup(config, "model.n_routed_experts"), lookup(config, "model.num_experts_per_tok")
    return f"{experts}, top {top_k}" if experts else None


def _balance(config: dict[str, Any]) -> str | None:
    if not isinstance(config.get("model"), dict):
        return None
    rate = lookup(config, "model.router_bias_rate")
    kind = lookup(config, "model.router_balance") or ("sign" if rate else "none")
    if kind not in ("sign", "proportional"):
        return str(kind)
    return f"{kind}, rate {rate:g}" if isinstance(rate, (int, float)) else None
