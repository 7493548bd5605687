"""What `launch/benchmark.py learning` compares: variants of one model and one DeepSpeed JSON."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError, sentence
from data.files import read_json
from launch.engine.strategy import check_kinds, unique_keys
from model import MoEGPTConfig

Fields = dict[str, Any]
NAME = re.compile(r"[\w-][\w.-]*")
#: The keys of a variant in a file, and in words what each is.
KINDS: dict[str, tuple[type, str]] = {
    "name": (str, "a string"),
    "model": (dict, "an object of fields of the model's config.json"),
    "deepspeed": (dict, "an object of settings of the DeepSpeed JSON"),
    "flags": (list, 'a list of flags of launch/train.py, such as ["--spike_sigma", "0"]'),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`model` replaces fields of the configuration, `deepspeed` merges into the JSON (null takes a key out)."""

    name: str
    model: Fields = field(default_factory=dict)
    deepspeed: Fields = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def config(self, base: MoEGPTConfig) -> MoEGPTConfig:
        """Raises UserError that names the variant."""
        own = {MoEGPTConfig.attribute_map.get(name, name): value for name, value in self.model.items()}
        known = base.to_dict()
        for name in own:
            if name not in known:
                raise UserError(f"variant {self.name!r}: the model's configuration has no field {name!r}")
        try:
            return MoEGPTConfig(**{**known, **own})
        except (TypeError, ValueError) as error:
            raise UserError(f"variant {self.name!r}: {sentence(error)}") from error

    def settings(self, base: Fields, path: Path) -> Fields:
        """Raises UserError that names the variant, for what has the wrong kind of value. `path`: what `base` is of."""
        settings = merged(base, self.deepspeed)
        try:
            check_kinds(path, settings)
        except UserError as error:
            raise UserError(f"variant {self.name!r}: {error}") from error
        return settings


def merged(base: Fields, changes: Fields) -> Fields:
    """`base` with `changes` laid over it, dictionary by dictionary; null takes a key out."""
    out = copy.deepcopy(base)
    for name, value in changes.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, dict) and isinstance(out.get(name), dict):
            out[name] = merged(out[name], value)
        else:
            out[name] = value
    return out


def built_in(config: MoEGPTConfig) -> dict[str, Variant]:
    """By name. `config` is the model's: its dense twin has as many experts as a token of it chooses, and no others. These are still
    mixed by the router; in the plain twin one is left, whose weight is 1, and the shared expert is wider by the others."""
    chosen = {"n_routed_experts": config.num_experts_per_tok, "n_group": 1, "topk_group": 1, "router_balance": "none"}
    plain = {**chosen, "n_routed_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    plain["n_shared_experts"] = config.n_shared_experts + config.num_experts_per_tok - 1
    # transformers' Glm4Moe of this shape, as it starts and as it trains: every matrix is drawn at 0.02, no correction bias moves,
    # nothing is added to the loss. Ours still: what writes into the residual stream starts smaller, by sqrt(2 layers); its
    # configuration's own defaults have a dense first layer and turn half of a head, which this model cannot.
    stock = {"attention_sinks": False, "qk_norm": False, "scoring_func": "sigmoid", "router_balance": "none"}
    stock |= dict.fromkeys(("initializer_range", "embedding_initializer_range", "router_initializer_range"), 0.02)
    stock |= dict.fromkeys(("router_aux_loss_coef", "z_loss_weight", "expert_dropout"), 0.0)
    muon = {"muon_lr": 0.02, "momentum": 0.95, "fused": None}  # embeddings, head and vectors keep AdamW at the JSON's rate
    steps = dict.fromkeys(("total_num_steps", "warmup_num_steps", "decay_num_steps"), "auto")
    wsd = {"type": "WarmupStableDecayLR", "params": {**steps, "cos_min_ratio": None}}
    variants = (
        Variant(name="ours"),
        Variant(name="sign", model={"router_balance": "sign"}),
        Variant(name="proportional", model={"router_balance": "proportional"}),
        Variant(name="quantile", model={"router_balance": "quantile"}),
        Variant(name="none", model={"router_balance": "none"}),
        Variant(name="auxiliary", model={"router_balance": "none", "router_aux_loss_coef": 0.01}),
        Variant(name="one_group", model={"n_group": 2, "topk_group": 1}),  # the presets of 800m, 4b and 60m before 0.2
        Variant(name="dense", model=chosen),
        Variant(name="dense_plain", model=plain),
        Variant(name="glm4_moe", model=stock),
        Variant(name="no_sinks", model={"attention_sinks": False}),
        Variant(name="adamw", deepspeed={"optimizer": {"type": "AdamW"}}),
        Variant(name="muon", deepspeed={"gradient_clipping": 0.0, "optimizer": {"type": "Muon", "params": muon}}),
        Variant(name="wsd", deepspeed={"scheduler": wsd}),
        Variant(name="sign_decaying", model={"router_balance": "sign", "router_bias_decay": 1.0}),
        Variant(name="quantile_averaged", model={"router_balance": "quantile", "router_bias_average": 0.5}),
    )
    return {variant.name: variant for variant in variants}


def chosen_variants(names: list[str], file: Path | None, config: MoEGPTConfig) -> list[Variant]:
    """Of the built-in ones those of `names`, then those of `file`. Raises UserError for unknown and repeated names."""
    known = built_in(config)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--variants {unknown[0]}: no such variant; the built-in ones are {', '.join(known)}")
    variants = [known[name] for name in names] + (read_variants(file) if file else [])
    if not variants:
        raise UserError(f"there is no variant to train: name some with --variants ({', '.join(known)}) or in --variants_file")
    all_names = [variant.name for variant in variants]
    twice = {name for name in all_names if all_names.count(name) > 1}
    if twice:
        raise UserError(f"variant {min(twice)!r} is there twice; give each a name of its own")
    return variants


def read_variants(path: Path) -> list[Variant]:
    """A JSON list of `{"name", "model": {}, "deepspeed": {}, "flags": []}`, all but the name optional."""
    try:
        rows = read_json(path, object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise NotFound(f"--variants_file {path} is not a file") from error
    except UserError as error:  # a key that stands twice
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {sentence(error)}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} must hold a list of variants, such as [{{"name": "wide", "model": {{"n_group": 1}}}}]')
    return [_variant(path, number, row) for number, row in enumerate(rows, 1)]


def _variant(path: Path, number: int, row: Any) -> Variant:
    where = f"{path}, variant {number}"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(f'{where}: it must be an object with a "name"')
    name = row["name"]
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: its name is a folder's as well: letters, digits, '-', '_' and '.' only, got {name!r}")
    for key, value in row.items():
        if key not in KINDS:
            raise UserError(f"{where}, {name!r}: unknown key {key!r}; there are {', '.join(KINDS)}")
        kind, words = KINDS[key]
        if not isinstance(value, kind):
            raise UserError(f"{where}, {name!r}: {key} must be {words}, got {value!r}")
    flags = tuple(map(str, row.get("flags", ())))
    if {"-h", "--help"} & set(flags):
        raise UserError(f"{where}, {name!r}: flags: --help trains nothing; take it out")
    return Variant(**{**row, "flags": flags})
