"""What of the DeepSpeed JSON is refused by our own knowledge: by training, and without a library's import by a plan too.

DeepSpeed takes all of it. `keys.py` and `values.py` ask DeepSpeed and PyTorch for the rest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.cli import UserError
from launch.engine.kinds import shown
from launch.engine.strategy import AUTO, Strategy, is_muon
from launch.nested import leaves, lookup

_JUDGED = "by the norm of its gradients a step is taken or skipped"
#: Settings that DeepSpeed takes and that are wrong here: the values that are right, and why. Each was seen to fail, or to go
#: wrong without a word, on two or four ranks.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    # Where one is off DeepSpeed takes no norm, or takes a step whose norm it was told is invalid: the `StepHook` has no veto, and
    # the rehearsal trains.
    "zero_optimization.compute_grad_norm": ((True,), _JUDGED),
    "bf16.check_grad_overflow": ((True,), _JUDGED),
    "managed_gradient_accumulation": (
        (True,),
        "DeepSpeed then takes a step whenever it is called: after every micro-batch, and in the rehearsal",
    ),
    "gradient_allreduce_op": (("mean",), "every gradient would be as many times as large as there are ranks"),
    "zero_optimization.round_robin_gradients": (
        (False,),
        "DeepSpeed then writes down another order of the weights than they have, and what is exported or converted is wrong",
    ),
    "zero_optimization.elastic_checkpoint": (
        (False,),
        "DeepSpeed cannot load what it then saves, and resuming on another number of ranks does not need it",
    ),
    "zero_optimization.load_from_fp32_weights": (
        (True,),
        "a resume would begin from weights rounded to the dtype of training, and not be the run that was stopped",
    ),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has removed it"),
    "zero_optimization.cpu_offload": ((False, None), "it is DeepSpeed's older name of offload_optimizer, which is read here"),
    "use_data_before_expert_parallelism": (
        (False,),
        "the copies of an expert then lie on other ranks than exports and conversions read them from",
    ),
    "tensor_parallel.autotp_size": (
        (0, 1),  # both are none
        "ranks share samples and experts here, no single matrix; see expert_parallel.autoep_size",
    ),
    "data_efficiency.enabled": ((False,), "it is for DeepSpeed's own data loader, which reads nothing here"),
    "hybrid_engine.enabled": ((False,), "it is for a model that generates while it trains"),
}
#: The same under mode `full`; the other modes call nothing that would read them.
ONLY_FULL: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing.partition_activations": (
        (False,),
        "DeepSpeed's checkpoint then passes no gradient on below the last block, which alone would learn",
    ),
    "activation_checkpointing.contiguous_memory_optimization": ((False,), "it needs partition_activations, which is refused"),
}
PRESET = "deepseek_v3"  # of AutoEP: how the model names and computes its experts
COMPILE = "compile.autoep_non_moe"
#: Of torch.optim, what ends at its first step, and why.
NOT_HERE = {
    "LBFGS": "it computes the loss again within a step, which DeepSpeed's engine does not do for it",
    "SparseAdam": "it takes sparse gradients alone, and all gradients here are dense",
}
#: DeepSpeed's own of these names take the switch, and end at it or do without.
WITHOUT_AMSGRAD = ("adam", "adamw", "lamb", "adagrad")


def check_refused(config: dict[str, Any], path: Path) -> None:
    """Of a resolved JSON. Raises UserError with the file, the key, the value and what would be right."""
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {key} must be a finite number, not {value}")
        if value == "auto" and not key.startswith("expert_parallel."):  # of which several are so by default
            filled = ", ".join(AUTO)
            raise UserError(f'{path}: {key} cannot be "auto": that is filled in for {filled}; give a value, or leave the key out')
    if (clipping := config.get("gradient_clipping", 0.0)) < 0:
        raise UserError(f"{path}: gradient_clipping must be 0 (none) or a norm, not {clipping}")
    chosen = Strategy.of(config)
    for key, (right, reason) in (ONLY | (ONLY_FULL if chosen.activation_checkpointing == "full" else {})).items():
        value = lookup(config, key, right[0])
        if (value.lower() if isinstance(value, str) else value) not in right:
            raise UserError(f"{path}: {key} must be {' or '.join(map(shown, right))}, not {shown(value)}: {reason}")
    if lookup(config, "checkpoint.writer") is not None:
        raise UserError(
            f"{path}: checkpoint.writer is not used: checkpoints are hashed as they are written, by this system; leave it out"
        )
    _check_optimizer(config, chosen, path)
    if (preset := config["expert_parallel"]["preset_model"]) != PRESET:
        raise UserError(
            f'{path}: expert_parallel.preset_model must be "{PRESET}", which this model is built as, not {shown(preset)}'
        )


def check_names_optimizer(config: dict[str, Any], path: Path) -> None:
    if not isinstance(config.get("optimizer"), dict) or "type" not in config["optimizer"]:
        raise UserError(f'{path}: "optimizer" must name a type, as in "optimizer": {{"type": "AdamW", "params": {{"lr": 0.001}}}}')


def check_compile(config: dict[str, Any], path: Path, *, documents: bool) -> None:
    """Of a resolved JSON. Raises UserError for what cannot be compiled. `documents`: with --document_mask."""
    if lookup(config, "compile.deepcompile"):
        raise UserError(f"{path}: compile.deepcompile takes the whole model, and AutoEP's layers cannot be traced; use {COMPILE}")
    chosen = Strategy.of(config)
    if not chosen.compiles:
        return
    if chosen.zero_stage == 3:
        raise UserError(f"{path}: {COMPILE} needs whole weights, and ZeRO stage 3 gathers them module by module; use stage 1 or 2")
    if documents:
        raise UserError(
            f"{path}: {COMPILE} and --document_mask exclude each other: every batch has documents of other lengths, and would be "
            "compiled anew; --no-compile leaves it out"
        )


def _check_optimizer(config: dict[str, Any], chosen: Strategy, path: Path) -> None:
    kind, params = chosen.optimizer, lookup(config, "optimizer.params") or {}
    if kind in NOT_HERE:
        raise UserError(f"{path}: optimizer.type {kind} cannot train here: {NOT_HERE[kind]}; take AdamW")
    if params.get("amsgrad") and kind.lower() in WITHOUT_AMSGRAD and not params.get("torch_adam"):
        mend = ', or take PyTorch\'s with "torch_adam": true' if kind.lower() in ("adam", "adamw") else ""
        raise UserError(f"{path}: optimizer.params.amsgrad must be false: DeepSpeed's own {kind} has none; leave it out{mend}")
    if is_muon(kind) and (chosen.zero_stage == 3 or chosen.offloads_optimizer):
        wrong, right = ("offload_optimizer", "leave it out") if chosen.offloads_optimizer else ("stage 3", "take stage 2")
        raise UserError(
            f"{path}: zero_optimization.{wrong} does not go with Muon: DeepSpeed then moves the momentum before a step can be "
            f"refused, and a resume is not the run that was stopped; {right}, or take AdamW"
        )
