"""Read a DeepSpeed JSON, check it, fill in its `"auto"` values, and say what it means by one typed name each.

The JSON owns batch sizes, optimizer, schedule, precision, clipping, ZeRO, expert parallelism and activation
checkpointing. DeepSpeed itself knows no `"auto"` and reports a wrong type by a traceback, on every rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from data.files import read_json
from launch.cli import CLONE
from launch.engine.kinds import NUMBER, OBJECT, SWITCH, TEXT, WHOLE, is_kind, shown
from launch.nested import lookup

CONFIG_FOLDER = CLONE / "ds_configs"
#: From no recomputation of activations to the most.
CHECKPOINTING_MODES = ("none", "selective", "full")
#: Of which any two give the third.
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
#: What a key must be that is read before, or without, DeepSpeed; of the others `keys.py` asks its own models and signatures.
KINDS = {
    "train_batch_size": WHOLE,
    "train_micro_batch_size_per_gpu": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "gradient_clipping": NUMBER,
    "steps_per_print": WHOLE,
    "optimizer": OBJECT,
    "optimizer.params": OBJECT,
    "optimizer.params.weight_decay": NUMBER,
    "scheduler": OBJECT,
    "scheduler.params": OBJECT,
    "scheduler.params.total_num_steps": WHOLE,
    "scheduler.params.warmup_num_steps": WHOLE,
    "scheduler.params.decay_num_steps": WHOLE,
    "data_types": OBJECT,
    "data_types.grad_accum_dtype": TEXT,
    "bf16": OBJECT,
    "bf16.enabled": SWITCH,
    "fp16": OBJECT,
    "fp16.enabled": SWITCH,
    "zero_optimization": OBJECT,
    "zero_optimization.stage": WHOLE,
    "zero_optimization.reduce_bucket_size": NUMBER,
    "zero_optimization.stage3_max_live_parameters": NUMBER,
    "zero_optimization.stage3_prefetch_bucket_size": NUMBER,
    "zero_optimization.offload_optimizer": OBJECT,
    "expert_parallel": OBJECT,
    "expert_parallel.enabled": SWITCH,
    "expert_parallel.autoep_size": WHOLE,
    "expert_parallel.use_grouped_mm": SWITCH,
    "compile": OBJECT,
    "compile.autoep_non_moe": SWITCH,
    "activation_checkpointing": OBJECT,
    "activation_checkpointing.mode": TEXT,
    "activation_checkpointing.cpu_checkpointing": SWITCH,
}
#: Which of them may be null as well.
NULLABLE = ("data_types.grad_accum_dtype", "zero_optimization.offload_optimizer")
#: Which may be "auto": `launch/train.py` fills it in.
AUTO = (*BATCH, *(f"scheduler.params.{name}_num_steps" for name in ("total", "warmup", "decay")))
#: What DeepSpeed calls the types in `data_types` (`DtypeEnum`, which imports torch), beside torch's own names.
DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
WARMUP_SHARE = 0.02  # of the run, at most WARMUP_MOST steps: DeepSeek-V3 (arXiv 2412.19437) warms up for 2,000
WARMUP_MOST = 2000
DECAY_SHARE = 0.1  # of the run: MiniCPM (arXiv 2404.06395, section 4.4) found a tenth to be enough


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What this system reads of a resolved DeepSpeed JSON; the defaults of what the file leaves out are DeepSpeed's."""

    train_batch_size: int  # samples of an optimizer step, over all ranks
    micro_batch_size: int  # samples of one forward pass on one rank
    accumulation_steps: int
    zero_stage: int
    ep_size: int  # ranks that share one copy of the experts; 1: every rank holds all of them
    dtype: str  # of the forward pass: bfloat16, float16 or float32
    gradient_dtype: str  # that gradients are summed in
    gradient_clipping: float  # 0: none
    optimizer: str
    weight_decay: float  # of matrices; vectors have none
    activation_checkpointing: str  # one of CHECKPOINTING_MODES
    compiles: bool  # each block's attention and norms, see regions.py
    offloads_optimizer: bool  # its state and step are on the host

    @classmethod
    def of(cls, config: dict[str, Any]) -> Strategy:
        """Of a JSON that `resolve_config` returned."""
        bf16, fp16 = (bool(lookup(config, f"{name}.enabled", False)) for name in ("bf16", "fp16"))
        dtype = "bfloat16" if bf16 else "float16" if fp16 else "float32"
        summed = (lookup(config, "data_types.grad_accum_dtype") or dtype).removeprefix("torch.")
        return cls(
            train_batch_size=config["train_batch_size"],
            micro_batch_size=config["train_micro_batch_size_per_gpu"],
            accumulation_steps=config["gradient_accumulation_steps"],
            zero_stage=lookup(config, "zero_optimization.stage", 0),
            ep_size=lookup(config, "expert_parallel.autoep_size", 1),
            dtype=dtype,
            gradient_dtype=DTYPES.get(summed, summed),
            gradient_clipping=float(config.get("gradient_clipping", 0.0)),
            optimizer=str(lookup(config, "optimizer.type", "")),
            weight_decay=float(lookup(config, "optimizer.params.weight_decay", 0.0)),
            activation_checkpointing=lookup(config, "activation_checkpointing.mode", "none"),
            compiles=lookup(config, "compile.autoep_non_moe", False),
            offloads_optimizer=lookup(config, "zero_optimization.offload_optimizer.device", "none") != "none",
        )


def is_muon(optimizer: str) -> bool:
    """Then embedding, head and vectors are AdamW's."""
    return optimizer.lower() == "muon"


def default_path(num_gpus: int, world_size: int, num_experts: int) -> Path:
    """The strategy for a command line without `--deepspeed_config`: as many ranks share the experts as divide both numbers."""
    sizes, prefix = ((8, 4, 1), "") if num_gpus else ((2, 1), "cpu_")
    size = next(n for n in sizes if world_size % n == num_experts % n == 0)
    return CONFIG_FOLDER / f"{prefix}ep{size}_zero2.json"


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`. Raises UserError for a key that stands twice in an object, of which JSON keeps the last."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise UserError(f"the key {next(k for k in names if names.count(k) > 1)!r} stands twice")
    return out


def read_config(path: Path) -> dict[str, Any]:
    """The JSON as a dict. Raises UserError with one sentence that names the file, the key and what would be right."""
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in CONFIG_FOLDER.glob("*.json")))
        raise NotFound(f"--deepspeed_config {path} is not a file; ds_configs/ has {found}")
    try:
        config = read_json(path, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: the top level must be an object of DeepSpeed settings, not a {type(config).__name__}")
    check_kinds(path, config)
    return config


def check_kinds(path: Path, config: dict[str, Any]) -> None:
    """KINDS, and the numbers and names of which only a few are right. Raises UserError for the first that is not."""
    if "bfloat16" in config:
        raise UserError(f'{path}: bfloat16 is DeepSpeed\'s older name of "bf16", which is read here; write "bf16"')
    missing = object()
    for dotted, kind in KINDS.items():
        value = lookup(config, dotted, missing)
        other = None if dotted in NULLABLE else "auto" if dotted in AUTO else missing
        if value in (missing, other) or is_kind(value, kind):
            continue
        more = "" if other is missing else f" or {shown(other)}"
        raise UserError(f"{path}: {dotted} must be {kind}{more}, not {shown(value)}")
    for name, given in zip(BATCH, given_batch(config), strict=True):
        if given is not None and given < 1:
            raise UserError(f"{path}: {name} must be at least 1, not {given}")
    stage = lookup(config, "zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage}")
    mode = lookup(config, "activation_checkpointing.mode", "none")
    if mode not in CHECKPOINTING_MODES:
        raise UserError(f"{path}: activation_checkpointing.mode must be one of {CHECKPOINTING_MODES}, not {mode!r}")


def with_mode(config: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """With `--activation_checkpointing` where it is given: the flag is a value of the JSON."""
    return {**config, "activation_checkpointing": {**config.get("activation_checkpointing", {}), "mode": mode}} if mode else config


def settings_of_run(config: dict[str, Any]) -> dict[str, Any]:
    """The resolved JSON of a run, from its config.json; of an old one the flag lay beside it."""
    return with_mode(config["deepspeed"], lookup(config, "arguments.activation_checkpointing"))


def resolve_config(config: dict[str, Any], path: Path, *, world_size: int, num_experts: int, max_steps: int) -> dict[str, Any]:
    """A copy with every `"auto"` filled in and the numbers of ranks, experts and samples checked against each other."""
    config = copy.deepcopy(config)
    _resolve_batch(config, path, world_size)
    _resolve_schedule(config, max_steps)
    _check_expert_parallel(config, path, world_size, num_experts)
    config.setdefault("steps_per_print", 2**31)  # our own log lines replace DeepSpeed's
    config.setdefault("wall_clock_breakdown", False)
    return config


def given_batch(config: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """BATCH as the JSON has it; None where the number follows from the others."""
    train, micro, accumulation = (None if config.get(name) == "auto" else config.get(name) for name in BATCH)
    return train, micro, accumulation


def _resolve_batch(config: dict[str, Any], path: Path, world_size: int) -> None:
    """train = micro x accumulation x ranks: any two give the third; a missing micro-batch size is 1."""
    given = train, micro, accumulation = given_batch(config)
    if train is None:
        micro, accumulation = micro or 1, accumulation or 1
        train = micro * accumulation * world_size
    elif micro is None:
        accumulation = accumulation or 1
        micro = train // (accumulation * world_size)
    elif accumulation is None:
        accumulation = train // (micro * world_size)
    if not micro or not accumulation or micro * accumulation * world_size != train:
        raise UserError(f"{path}: {_uneven(train, *given[1:], world_size)}")
    config.update(zip(BATCH, (train, micro, accumulation), strict=True))


def _uneven(train: int, micro: int | None, accumulation: int | None, world_size: int) -> str:
    """A global batch that the ranks cannot share, in words, and what would do. What is "auto" is not named: nobody wrote it."""
    if micro and accumulation:
        return (
            f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} "
            f"x {world_size} ranks; change one of them or the number of ranks"
        )
    name, size = (BATCH[1], micro) if micro else (BATCH[2], accumulation or 1)
    written = f" x {name} {size}" if micro or accumulation else ""
    share = train // world_size if train % world_size == 0 else 0
    lower = [n for low in range(1, math.isqrt(share) + 1) if share % low == 0 for n in (low, share // low) if n < size]
    return (
        f"train_batch_size {train} is no multiple of {size * world_size:,} ({world_size} ranks{written}); make it one"
        f"{f', lower {name} to {max(lower)}' if lower else ''} or change the number of ranks"
    )


def _resolve_schedule(config: dict[str, Any], max_steps: int) -> None:
    params = lookup(config, "scheduler.params")
    if params is None:
        return
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = max_steps
    if params.get("warmup_num_steps") == "auto":
        params["warmup_num_steps"] = max(2, min(WARMUP_MOST, int(max_steps * WARMUP_SHARE)))
    if params.get("decay_num_steps") == "auto":
        params["decay_num_steps"] = max(1, int(max_steps * DECAY_SHARE))


def schedule_hint(schedule: object, max_steps: int) -> str | None:
    """What a user should know whose schedule, in steps of its own, is none of this run's. DeepSpeed's own defaults count: 1,000
    steps of warm-up where the JSON names none."""
    warmup, total = getattr(schedule, "warmup_num_steps", 0), getattr(schedule, "total_num_steps", max_steps)
    if warmup >= max_steps and max_steps > 2:  # a warm-up has two steps at least, of any run
        return (
            f"warning: scheduler.params.warmup_num_steps is {warmup:,} and the run has {max_steps:,} steps: it ends before the "
            'learning rate is reached; "auto" suits any length'
        )
    if total < max_steps:
        return (
            f"warning: scheduler.params.total_num_steps is {total:,} and the run has {max_steps:,} steps: the rest is trained at "
            'the last rate; "auto" suits any length'
        )
    return None


def check_precision(config: dict[str, Any], path: Path) -> None:
    """Of a resolved JSON, dtypes that DeepSpeed takes together: with ZeRO all (`_do_optimizer_sanity_check` in
    deepspeed/runtime/engine.py, 0.19.8). Apart from `resolve_config`, since a misspelt section is to be named as that first."""
    if all(lookup(config, f"{name}.enabled", False) for name in ("bf16", "fp16")):
        raise UserError(f"{path}: bf16.enabled and fp16.enabled cannot both be true; leave one of them out")
    chosen = Strategy.of(config)
    if chosen.zero_stage > 0:
        return
    if chosen.dtype == "float16":
        raise UserError(f"{path}: fp16.enabled needs zero_optimization.stage 1, 2 or 3: without ZeRO no checkpoint can be written")
    if chosen.gradient_dtype != chosen.dtype:
        raise UserError(
            f"{path}: data_types.grad_accum_dtype must be left out with zero_optimization.stage 0, not "
            f"{shown(lookup(config, 'data_types.grad_accum_dtype'))}: without ZeRO DeepSpeed sums {chosen.dtype} gradients in "
            "their own dtype alone"
        )


def _check_expert_parallel(config: dict[str, Any], path: Path, world_size: int, num_experts: int) -> None:
    if not lookup(config, "expert_parallel.enabled", False):
        raise UserError(
            f"{path}: expert_parallel.enabled must be true (an autoep_size of 1 keeps all experts on every rank), e.g. "
            '"expert_parallel": {"enabled": true, "autoep_size": 1, "preset_model": "deepseek_v3"}'
        )
    size = lookup(config, "expert_parallel.autoep_size", 1)
    if size < 1 or num_experts % size:
        raise UserError(f"{path}: expert_parallel.autoep_size {size} does not divide the model's {num_experts} experts")
    if world_size % size:
        raise UserError(f"{path}: expert_parallel.autoep_size {size} does not divide the {world_size} ranks")
    config["expert_parallel"].setdefault("preset_model", "deepseek_v3")
