"""Every key of the DeepSpeed JSON that nobody reads is refused, at every depth, with the nearest right name."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data.cli import UserError
from launch.engine.keys import check_keys
from launch.engine.strategy import CONFIG_FOLDER, read_config, resolve_config
from launch.planning.unread import check_unread

BASE = read_config(CONFIG_FOLDER / "ep8_zero2.json")
PATH = Path("some.json")
WSD: dict[str, Any] = {"type": "WarmupStableDecayLR"}


def check(config: dict[str, Any]) -> None:
    check_keys(resolve_config(config, PATH, world_size=8, num_experts=8, max_steps=100), PATH)


def changed(dotted: str, value: Any = None, *, renamed: str = "") -> dict[str, Any]:
    """The base with a value set, or a key renamed."""
    config = copy.deepcopy(BASE)
    *outer, key = dotted.split(".")
    section = config
    for name in outer:
        section = section[name]
    if renamed:
        section[renamed] = section.pop(key)
    else:
        section[key] = value
    return config


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.json")), ids=lambda p: p.name)
def test_every_strategy_of_ours_passes(path: Path) -> None:
    check(read_config(path))


MISSPELT = [
    ("gradient_clipping", "gradient_cliping"),
    ("scheduler", "shceduler"),
    ("train_batch_size", "train_batch_sise"),
    ("data_types", "data_type"),
    ("bf16", "bf_16"),
    ("zero_optimization", "zero_optimisation"),
    ("activation_checkpointing.mode", "mod"),
    ("activation_checkpointing.cpu_checkpointing", "cpu_checkpoint"),
    ("expert_parallel.autoep_size", "autoep_sise"),
    ("optimizer.params", "parms"),
    ("optimizer.params.weight_decay", "weight_decy"),
    ("optimizer.params.fused", "fuse"),
    ("scheduler.params.cos_min_ratio", "cos_min_ration"),
    ("scheduler.params.warmup_num_steps", "warmup_steps"),
    ("data_types.grad_accum_dtype", "grad_acum_dtype"),
    ("bf16.enabled", "enable"),
    ("zero_optimization.stage", "stge"),
    ("zero_optimization.reduce_bucket_size", "reduce_bucketsize"),
]


@pytest.mark.parametrize("right, wrong", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_right_one(right: str, wrong: str) -> None:
    whole = ".".join([*right.split(".")[:-1], wrong])
    with pytest.raises(UserError) as caught:
        check(changed(right, renamed=wrong))
    said = str(caught.value)
    assert said.startswith(f'some.json: unknown key "{whole}"') and said.endswith(f'did you mean "{right.split(".")[-1]}"?')


@pytest.mark.parametrize(
    "section, value, wanted",
    [
        ("zero_optimization.offload_optimizer", {"devise": "cpu"}, 'unknown key "zero_optimization.offload_optimizer.devise"'),
        ("checkpoint", {"tag_validatoin": "Warn"}, 'did you mean "tag_validation"?'),
        ("flops_profiler", {"enabled": False, "profil_step": 1}, 'did you mean "profile_step"?'),
        ("aio", {"blok_size": 1}, 'did you mean "block_size"?'),
        ("fp16", {"enabled": False, "los_scale": 1}, 'did you mean "loss_scale"?'),
        ("tensorboard", {"enabld": True}, 'did you mean "enabled"?'),
        ("compile", {"enabled": True}, 'unknown key "compile.enabled"'),
        ("wandb", {"api_key": "hunter2"}, 'unknown key "wandb.api_key"'),
        ("qqq", 1, 'unknown key "qqq", which neither DeepSpeed nor this system reads'),
        ("zero_optimization.overlap_comm", "maybe", "zero_optimization.overlap_comm: Input should be a valid boolean"),
        ("zero_optimization.offload_optimizer", {"device": "gpu"}, "Input should be 'none', 'cpu' or 'nvme'"),
        ("optimizer.type", "AdamWW", '"AdamWW" is not an optimizer of DeepSpeed or torch.optim; did you mean "adamw"?'),
        ("scheduler.type", "WarmupCosinLR", 'did you mean "WarmupCosineLR"?'),
        ("scheduler.type", "WarmupStableDecay", 'did you mean "WarmupStableDecayLR"?'),
        ("scheduler", {**WSD, "params": {"decay_num_step": 3}}, 'did you mean "decay_num_steps"?'),
        ("optimizer", {"params": {}}, '"optimizer" must name a type'),
        ("elasticity", {"enabled": False}, "Elastic training has been removed"),
    ],
)
def test_sections_that_are_wrong_in_themselves(section: str, value: Any, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        check(changed(section, value))
    said = str(caught.value)
    assert said.startswith("some.json: ") and wanted in said and "hunter2" not in said


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("gradient_clipping", -1, "gradient_clipping must be 0 (none) or a norm, not -1"),
        ("zero_optimization.round_robin_gradients", True, "round_robin_gradients must be false, not true: DeepSpeed then writes"),
        ("zero_optimization.compute_grad_norm", False, "compute_grad_norm must be true, not false: by the norm of its gradients"),
        (
            "bf16.check_grad_overflow",
            False,
            "bf16.check_grad_overflow must be true, not false: by the norm of its gradients a step",
        ),
        ("managed_gradient_accumulation", False, "accumulation must be true, not false: DeepSpeed then takes a step whenever"),
        ("gradient_allreduce_op", "sum", 'gradient_allreduce_op must be "mean", not "sum": every gradient would be as many times'),
        ("zero_optimization.elastic_checkpoint", True, "elastic_checkpoint must be false, not true: DeepSpeed cannot load what"),
        ("zero_optimization.load_from_fp32_weights", False, "load_from_fp32_weights must be true, not false: a resume would begin"),
        ("zero_optimization.cpu_offload", True, "cpu_offload must be false or null, not true: it is DeepSpeed's older name of"),
        ("zero_optimization.legacy_stage1", True, "legacy_stage1 must be false, not true: DeepSpeed has removed it"),
        ("use_data_before_expert_parallelism", True, "parallelism must be false, not true: the copies of an expert then lie on"),
        ("tensor_parallel", {"autotp_size": 2}, "tensor_parallel.autotp_size must be 0 or 1, not 2: ranks share samples"),
        ("data_efficiency", {"enabled": True}, "data_efficiency.enabled must be false, not true: it is for DeepSpeed's own"),
        ("hybrid_engine", {"enabled": True}, "hybrid_engine.enabled must be false, not true: it is for a model that generates"),
        ("checkpoint", {"writer": {"type": "fast"}}, "checkpoint.writer is not used: checkpoints are hashed as they are written"),
        ("bfloat16", {"enabled": True}, 'bfloat16 is DeepSpeed\'s older name of "bf16", which is read here'),
        ("steps_per_print", "10", "steps_per_print must be a whole number"),
        ("optimizer.params.lr", float("inf"), "optimizer.params.lr must be a finite number, not inf"),
        ("gradient_clipping", float("nan"), "gradient_clipping must be a finite number, not nan"),
        ("optimizer", {"type": "LBFGS", "params": {"lr": 1}}, "optimizer.type LBFGS cannot train here: it computes the loss"),
        (
            "optimizer",
            {"type": "SparseAdam", "params": {}},
            "optimizer.type SparseAdam cannot train here: it takes sparse gradients",
        ),
        ("optimizer.params", {"lr": 1, "amsgrad": True}, "amsgrad must be false: DeepSpeed's own AdamW has none; leave it out, or"),
        ("optimizer", {"type": "Lamb", "params": {"lr": 1, "amsgrad": True}}, "DeepSpeed's own Lamb has none; leave it out"),
        ("optimizer.params.lr", None, "optimizer.params.lr must be a number, not null"),
        ("optimizer.params.lr", -1, "AdamW refuses them: Invalid learning rate: -1"),
        ("optimizer.params.eps", "1e-8", 'optimizer.params.eps must be a number, not "1e-8"'),
        ("optimizer.params.eps", None, "optimizer.params.eps must be a number, not null"),
        ("optimizer.params.betas", [], "optimizer.params.betas must be a list of 2 numbers, not []"),
        ("optimizer.params.betas", ["0.9", "0.95"], "must be a list of 2 numbers"),
        ("optimizer.params.betas", [0.9, 1.5], "Invalid beta parameter at index 1: 1.5"),
        ("optimizer.params.weight_decay", -1, "Invalid weight_decay value: -1"),
        ("optimizer.params.fused", "true", 'optimizer.params.fused must be true or false, not "true"'),
        ("optimizer.params.torch_adam", "false", 'optimizer.params.torch_adam must be true or false, not "false"'),
        ("zero_optimization.reduce_bucket_size", "auto", 'reduce_bucket_size must be a number, not "auto"'),
        ("zero_optimization.allgather_bucket_size", "auto", 'zero_optimization.allgather_bucket_size cannot be "auto"'),
        ("zero_optimization.offload_optimizer", "cpu", 'offload_optimizer must be an object or null, not "cpu"'),
        ("scheduler.params.warmup_type", "cubic", "scheduler.params.warmup_type must be one of ('log', 'linear'), not \"cubic\""),
        ("scheduler.params.cos_min_ratio", "0.1", 'scheduler.params.cos_min_ratio must be a number, not "0.1"'),
        ("scheduler.params.cos_min_ratio", None, "scheduler.params.cos_min_ratio must be a number, not null"),
        ("scheduler.params.warmup_num_steps", 0, "WarmupCosineLR refuses them: warmup_num_steps must be a positive integer, got 0"),
        ("scheduler.params.total_num_steps", 0, "scheduler.params.total_num_steps must be at least 1, not 0"),
        ("scheduler", {"type": "WarmupDecayLR", "params": {}}, "WarmupDecayLR refuses them"),
        ("scheduler", {**WSD, "params": {"total_num_steps": 9}}, "decay_num_steps must be 1 to total_num_steps (9), not 1000"),
        ("scheduler", {**WSD, "params": {"total_num_steps": 9, "decay_type": 3}}, "decay_type must be a string, not 3"),
        ("scheduler", {**WSD, "params": {"decay_num_steps": "all"}}, 'decay_num_steps must be a whole number or "auto", not "all"'),
        ("data_types", "fp32", "data_types must be an object"),
        ("data_types.grad_accum_dtype", "float33", 'must be one of "fp16", "fp32", "int8", "bf16", not "float33"'),
        ("expert_parallel.preset_model", "mixtral", 'expert_parallel.preset_model must be "deepseek_v3"'),
        ("expert_parallel.preset_model", None, 'expert_parallel.preset_model must be "deepseek_v3"'),
        ("expert_parallel.top_k", 1, "must be left out, not 1: num_experts_per_tok of the model's config.json is what counts"),
        ("expert_parallel.top_k", None, "expert_parallel.top_k must be left out, not null"),
        ("expert_parallel.score_func", "softmax", "scoring_func of the model's"),
        ("expert_parallel.route_norm", False, "norm_topk_prob of the model's"),
        ("expert_parallel.route_scale", 2.5, "routed_scaling_factor of the model's"),
        ("expert_parallel.routed_scaling_factor", 2.5, "routed_scaling_factor of the model's"),
        ("expert_parallel.num_expert_groups", 2, "n_group of the model's"),
        ("expert_parallel.num_limited_groups", 1, "topk_group of the model's"),
        ("expert_parallel.has_shared_experts", False, "must be left out, not false: it is for other models, or for AutoEP's own"),
        ("expert_parallel.shared_experts_pattern", "shared", "it is for other models"),
        ("expert_parallel.moe_layer_pattern", "mlp", "it is for other models"),
        ("expert_parallel.async_split_plan", True, "it is for other models"),
        ("expert_parallel.combine_impl", "legacy_bmm", "it is for other models"),
        ("expert_parallel.gate_up_impl", "fused", "it is for other models"),
        ("expert_parallel.score_apply", "pre", "it is for other models"),
        ("expert_parallel.load_balance_coeff", 0.001, "load_balance_coeff"),
        ("expert_parallel.use_grouped_mm", "auto", "use_grouped_mm must be true or false"),
        ("expert_parallel.disable_triton_grouped_mm", "auto", "disable_triton_grouped_mm must be true or false"),
        ("prescale_gradients", "false", 'prescale_gradients must be true or false, not "false"'),
        ("gradient_predivide_factor", "2", 'gradient_predivide_factor must be a number, not "2"'),
        ("zero_allow_untested_optimizer", {}, "zero_allow_untested_optimizer must be true or false, not {}"),
        ("torch_autocast", {"enabled": "x"}, 'torch_autocast.enabled must be true or false, not "x"'),
        ("flops_profiler", True, "flops_profiler must not be true: DeepSpeed expects a value of another kind"),
        ("checkpoint", None, "checkpoint must not be null"),
        ("communication_data_type", [], "communication_data_type must not be []"),
    ],
)
def test_a_right_key_with_a_wrong_value_is_refused(key: str, value: Any, wanted: str, tmp_path: Path) -> None:
    """Some were a traceback in the engine, some (`"false"` is true) trained otherwise, some ended a run after its warm-up."""
    path = tmp_path / "some.json"
    path.write_text(json.dumps(changed(key, value)))
    with pytest.raises(UserError) as caught:
        check(read_config(path))
    said = str(caught.value)
    assert ".json: " in said and wanted in said and "\n" not in said


#: Of what only AutoEP's own layer reads: a JSON that spells them out is no mistake.
AUTOEP_DEFAULTS = [
    ("top_k", "auto"),
    ("score_func", "auto"),
    ("route_norm", None),
    ("route_scale", 1.0),
    ("routed_scaling_factor", "auto"),
    ("load_balance_coeff", None),
    ("combine_impl", "auto"),
    ("comm_backend", "comm"),
    ("expert_tensor_parallel_size", 1),
]


@pytest.mark.parametrize(
    "section, value",
    [
        ("zero_force_ds_cpu_optimizer", False),
        ("zero_allow_untested_optimizer", True),
        ("wall_clock_breakdown", True),
        ("prescale_gradients", False),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True}),
        ("flops_profiler", {"enabled": True, "profile_step": 5}),
        ("comms_logger", {"enabled": False, "verbose": True}),
        ("checkpoint", {"tag_validation": "Warn"}),
        ("checkpoint", {"writer": None}),
        ("tensor_parallel", {"autotp_size": 0}),  # DeepSpeed's default
        ("tensor_parallel", {"autotp_size": 1}),
        ("optimizer", {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}),
        ("optimizer", {"type": "Lion", "params": {"lr": 0.1, "betas": [0.9, 0.99]}}),
        ("optimizer", {"type": "Lion", "params": {"lr": 0.1, "set_grad_none": True}}),  # of its second class alone
        ("optimizer", {"type": "Adam", "params": {"lr": 0.1, "adam_w_mode": True, "bias_correction": True}}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": None}}),
        ("scheduler", {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}),
        ("optimizer.params.fused", None),
        ("optimizer.params.amsgrad", True),  # of PyTorch's
        ("optimizer.params", {"lr": 1, "amsgrad": False}),
        ("communication_data_type", None),
        ("gradient_allreduce_op", "MEAN"),  # DeepSpeed takes it so too
        ("expert_parallel.disable_triton_grouped_mm", True),
        ("expert_parallel.score_apply", "post"),
        *((f"expert_parallel.{name}", value) for name, value in AUTOEP_DEFAULTS),
    ],
)
def test_what_deepspeed_reads_is_not_refused(section: str, value: Any) -> None:
    check(changed(section, value))
    assert check_unread(changed(section, value), PATH) == [], "nor by a plan"


@pytest.mark.parametrize("device", ["cpu", "none"])
def test_an_optimizer_on_the_host_takes_what_its_own_class_takes(device: str) -> None:
    """DeepSpeed's CPU Adam, and not its fused one."""
    config = read_config(CONFIG_FOLDER / "ep8_zero2_offload.json")
    config["zero_optimization"]["offload_optimizer"]["device"] = device
    config["optimizer"]["params"]["set_grad_none"] = True
    with pytest.raises(UserError, match=r'unknown key "optimizer\.params\.set_grad_none"') if device == "cpu" else nullcontext():
        check(config)


@pytest.mark.parametrize(("stage", "bf16", "refused"), [(0, False, False), (0, True, True), (1, False, True), (3, False, True)])
def test_a_schedule_of_torch_s_takes_only_an_optimizer_of_torch_s(stage: int, bf16: bool, refused: bool) -> None:
    """With the others every rank ended in a traceback while the engine was built."""
    config = changed("scheduler", {"type": "StepLR", "params": {"step_size": 10}})
    config["zero_optimization"]["stage"], config["bf16"] = stage, {"enabled": bf16}
    said = "scheduler.type StepLR is PyTorch's, .*; take one of WarmupStableDecayLR, .*WarmupCosineLR"
    with pytest.raises(UserError, match=said) if refused else nullcontext():
        check(config)
    config["scheduler"]["params"] = {"step_size": "ten"}
    with pytest.raises(UserError, match="StepLR is PyTorch's" if refused else "StepLR refuses them"):
        check(config)
    config["scheduler"] = {"type": "ReduceLROnPlateau", "params": {}}  # at its first step
    with pytest.raises(UserError, match="ReduceLROnPlateau is PyTorch's" if refused else "ReduceLROnPlateau refuses them"):
        check(config)


@pytest.mark.parametrize("mode", ["full", "selective", "none"])
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("partition_activations", "must be false, not true: DeepSpeed's checkpoint then passes no"),
        ("contiguous_memory_optimization", "must be false, not true: it needs partition_activations"),
    ],
)
def test_what_only_recomputed_blocks_read_is_refused_for_them_alone(key: str, said: str, mode: str) -> None:
    config = changed("activation_checkpointing", {"mode": mode, key: True})
    with pytest.raises(UserError, match=said) if mode == "full" else nullcontext():
        check(config)


MUON = [
    ("Muon", 2, "cpu", "zero_optimization.offload_optimizer does not go with Muon: .* leave it out"),
    ("Muon", 3, "none", "zero_optimization.stage 3 does not go with Muon: .* take stage 2"),
    ("Muon", 2, "none", ""),
    ("AdamW", 3, "cpu", ""),
]


@pytest.mark.parametrize(("kind", "stage", "device", "said"), MUON)
def test_muon_does_not_go_with_offload_or_stage_3(kind: str, stage: int, device: str, said: str) -> None:
    """Its momentum moved in the rehearsal and in every step that was refused."""
    config = read_config(CONFIG_FOLDER / "ep8_zero2_muon.json")
    config["optimizer"] = {"type": kind, "params": config["optimizer"]["params"] if kind == "Muon" else {"lr": 1e-3}}
    config["zero_optimization"].update(stage=stage, offload_optimizer={"device": device}, reduce_scatter=False)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check(config)
