"""The DeepSpeed JSON: every shipped file resolves, `"auto"` is filled in by the stated rule, mistakes are named."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from data.cli import UserError
from launch.engine.strategy import (
    CHECKPOINTING_MODES,
    CONFIG_FOLDER,
    Strategy,
    check_precision,
    default_path,
    read_config,
    resolve_config,
    schedule_hint,
)
from launch.nested import lookup

SHIPPED = sorted(CONFIG_FOLDER.glob("*.json"))


def resolve(path: Path, *, world_size: int, num_experts: int = 8, max_steps: int = 1000) -> dict:
    return resolve_config(read_config(path), path, world_size=world_size, num_experts=num_experts, max_steps=max_steps)


def written(folder: Path, **changes: object) -> Path:
    config = json.loads((CONFIG_FOLDER / "ep8_zero2.json").read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        at = config
        for parent in parents:
            at = at[parent]
        at[key] = value
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_resolves(path: Path) -> None:
    size = json.loads(path.read_text())["expert_parallel"]["autoep_size"]
    config = resolve(path, world_size=size)
    assert '"auto"' not in json.dumps(config)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert micro * accumulation * size == config["train_batch_size"]
    # DeepSpeed measures Muon's norm after orthogonalisation, where clipping would only divide the learning rate.
    assert config["gradient_clipping"] == (0.0 if "muon" in path.name else 1.0)
    assert lookup(config, "optimizer.params.betas") == [0.9, 0.95]
    assert lookup(config, "optimizer.params.weight_decay") == 0.01


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_typed_view_says_what_the_file_says(path: Path) -> None:
    """Read once more by hand, and by DeepSpeed's own models where they have the field."""
    raw = json.loads(path.read_text())
    size = raw["expert_parallel"]["autoep_size"]
    strategy = Strategy.of(resolve(path, world_size=size))
    assert strategy.train_batch_size == raw["train_batch_size"]
    assert strategy.micro_batch_size * strategy.accumulation_steps * size == strategy.train_batch_size
    theirs = DeepSpeedZeroConfig(**raw["zero_optimization"])
    offloads = theirs.offload_optimizer is not None and theirs.offload_optimizer.device != "none"
    assert (strategy.zero_stage, strategy.offloads_optimizer) == (int(theirs.stage), offloads)
    assert (strategy.ep_size, strategy.dtype) == (size, "bfloat16" if raw.get("bf16", {}).get("enabled") else "float32")
    assert strategy.weight_decay == raw["optimizer"]["params"]["weight_decay"] and strategy.optimizer == raw["optimizer"]["type"]
    assert strategy.activation_checkpointing == raw["activation_checkpointing"]["mode"]
    assert strategy.activation_checkpointing in CHECKPOINTING_MODES


def test_the_typed_view_of_what_a_file_leaves_out() -> None:
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    least = Strategy.of(sizes)
    assert (least.zero_stage, least.ep_size, least.dtype, least.gradient_clipping) == (0, 1, "float32", 0.0)
    assert (least.weight_decay, least.activation_checkpointing, least.offloads_optimizer) == (0.0, "none", False)
    assert Strategy.of({**sizes, "fp16": {"enabled": True}}).dtype == "float16"


def test_every_shipped_file_is_described() -> None:
    table = (CONFIG_FOLDER / "README.md").read_text()
    missing = [path.name for path in SHIPPED if f"`{path.name}`" not in table]
    assert not missing


def test_defaults_by_number_of_gpus() -> None:
    named = {(gpus, ranks): default_path(gpus, ranks, 8).name for gpus, ranks in [(8, 8), (8, 16), (4, 4), (1, 1), (3, 3)]}
    assert named == {
        (8, 8): "ep8_zero2.json",
        (8, 16): "ep8_zero2.json",
        (4, 4): "ep4_zero2.json",
        (1, 1): "ep1_zero2.json",
        (3, 3): "ep1_zero2.json",
    }
    assert default_path(0, 2, 8).name == "cpu_ep2_zero2.json"
    assert default_path(0, 1, 8).name == "cpu_ep1_zero2.json"


def test_a_default_divides_the_models_experts() -> None:
    """60m has four, on eight GPUs."""
    assert default_path(8, 8, 4).name == "ep4_zero2.json" and default_path(8, 8, 6).name == "ep1_zero2.json"
    assert default_path(0, 2, 3).name == default_path(0, 3, 4).name == "cpu_ep1_zero2.json"
    assert resolve(default_path(8, 8, 4), world_size=8, num_experts=4)["gradient_accumulation_steps"] == 4


def test_dtypes_by_every_name_that_deepspeed_has() -> None:
    """Beside `DtypeEnum`, which imports torch."""
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    for each in DtypeEnum:
        for name in each._all_values:
            if not isinstance(name, torch.dtype):
                found = Strategy.of({**sizes, "data_types": {"grad_accum_dtype": name}}).gradient_dtype
                assert f"torch.{found}" == str(each.value)
    assert Strategy.of({**sizes, "bf16": {"enabled": True}}).gradient_dtype == "bfloat16"


@pytest.mark.parametrize(("dtype", "summed", "is_taken"), [
    ("bf16", None, True), ("bf16", "bfloat16", True), ("bf16", "fp32", False), ("bf16", "fp16", False),
    ("fp32", None, True), ("fp32", "float", True), ("fp32", "bf16", False),
])  # fmt: skip
def test_without_zero_gradients_are_summed_in_their_own_dtype(tmp_path: Path, dtype: str, summed: str, is_taken: bool) -> None:
    """As DeepSpeed's engine decides, asked here."""
    changes = {"bf16__enabled": dtype == "bf16", "data_types__grad_accum_dtype": summed}
    stage = SimpleNamespace(
        fp16_enabled=lambda: False,
        bfloat16_enabled=lambda: dtype == "bf16",
        _config=SimpleNamespace(grad_accum_dtype=summed),
        zero_optimization=lambda: False,
        pipeline_parallelism=False,
    )
    stage.get_data_types = lambda: DeepSpeedEngine.get_data_types(stage)
    with nullcontext() if is_taken else pytest.raises(NotImplementedError, match="unsupported mix"):
        DeepSpeedEngine._do_optimizer_sanity_check(stage, None)
    wanted = "grad_accum_dtype must be left out with zero_optimization.stage 0, not "
    with nullcontext() if is_taken else pytest.raises(UserError, match=wanted):
        check_precision(resolve(written(tmp_path, zero_optimization__stage=0, **changes), world_size=8), tmp_path)
    check_precision(resolve(written(tmp_path, **changes), world_size=8), tmp_path)  # ZeRO takes every mix


def test_auto_accumulation_keeps_the_global_batch(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert [resolve(path, world_size=n)["gradient_accumulation_steps"] for n in (8, 16, 32)] == [4, 2, 1]


def test_auto_schedule_follows_the_run(tmp_path: Path) -> None:
    params = resolve(written(tmp_path), world_size=8, max_steps=5000)["scheduler"]["params"]
    assert (params["total_num_steps"], params["warmup_num_steps"]) == (5000, 100)
    params = resolve(written(tmp_path), world_size=8, max_steps=1_000_000)["scheduler"]["params"]
    assert params["warmup_num_steps"] == 2000


MISTAKES = [
    ({"gradient_clipping": "1"}, 'gradient_clipping must be a number, not "1"'),
    ({"train_batch_size": True}, 'train_batch_size must be a whole number or "auto", not true'),
    (
        {"train_batch_size": 100},
        "train_batch_size 100 is no multiple of 64 (8 ranks x train_micro_batch_size_per_gpu 8); ",
    ),
    ({"gradient_accumulation_steps": 3}, "not train_micro_batch_size_per_gpu 8 x gradient_accumulation_steps 3 x 8 ranks; change"),
    ({"train_batch_size": 0}, "must be at least 1"),
    ({"zero_optimization__stage": 4}, "stage must be 0, 1, 2 or 3"),
    ({"zero_optimization": 2}, "zero_optimization must be an object"),
    ({"expert_parallel__autoep_size": 3}, "autoep_size 3 does not divide the model's 8 experts"),
    ({"expert_parallel__autoep_size": "auto"}, "autoep_size must be a whole number"),
    ({"expert_parallel__enabled": False}, "expert_parallel.enabled must be true"),
    ({"activation_checkpointing__mode": "half"}, "mode must be one of"),
    ({"optimizer__params__weight_decay": None}, "weight_decay must be a number, not null"),
]


def test_a_schedule_of_another_length_is_warned_of() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)

    def said(kind: type, **steps: int) -> str:
        return str(schedule_hint(kind(optimizer, **steps), max_steps=400))

    warm_up, decay = lr_schedules.WarmupLR, lr_schedules.WarmupDecayLR
    assert "warmup_num_steps is 2,000 and the run has 400 steps" in said(decay, warmup_num_steps=2000, total_num_steps=400)
    assert "total_num_steps is 399 and the run has 400 steps" in said(decay, warmup_num_steps=10, total_num_steps=399)
    assert "warmup_num_steps is 1,000 and the run has 400 steps" in said(warm_up)  # DeepSpeed's default
    for kind, right in ((decay, {"warmup_num_steps": 10, "total_num_steps": 400}), (warm_up, {"warmup_num_steps": 399})):
        assert said(kind, **right) == "None"
    assert schedule_hint(decay(optimizer, total_num_steps=2, warmup_num_steps=2), max_steps=2) is None  # what "auto" is there
    assert said(torch.optim.lr_scheduler.StepLR, step_size=30) == str(schedule_hint(None, max_steps=400)) == "None"


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES, ids=[next(iter(c)) for c, _ in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        resolve(written(tmp_path, **changes), world_size=8)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "changes", "sentence"),
    [
        (
            64,
            {},
            "512 (64 ranks x train_micro_batch_size_per_gpu 8); make it one, lower train_micro_batch_size_per_gpu to 4 or",
        ),
        (
            8,
            {"train_micro_batch_size_per_gpu": 10**8},  # tokens in the place of samples: each smaller one was tried
            "800,000,000 (8 ranks x train_micro_batch_size_per_gpu 100000000); make it one, lower "
            "train_micro_batch_size_per_gpu to 32 or",
        ),
        (512, {}, "4,096 (512 ranks x train_micro_batch_size_per_gpu 8); make it one or change the number of ranks"),
        (512, {"train_micro_batch_size_per_gpu": "auto"}, "512 (512 ranks); make it one or change the number of ranks"),
        (
            128,
            {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 4},
            "512 (128 ranks x gradient_accumulation_steps 4); make it one, lower gradient_accumulation_steps to 2 or",
        ),
    ],
)
def test_more_ranks_than_a_batch_has_micro_batches(tmp_path: Path, world_size: int, changes: dict, sentence: str) -> None:
    """A 0 that nobody wrote is not what is wrong."""
    with pytest.raises(ValueError, match="is no multiple") as caught:
        resolve(written(tmp_path, **changes), world_size=world_size)
    assert f"train_batch_size 256 is no multiple of {sentence}" in str(caught.value)


def test_expert_parallelism_must_divide_the_ranks(tmp_path: Path) -> None:
    path = written(tmp_path, expert_parallel__autoep_size=8, train_batch_size=96)
    with pytest.raises(ValueError, match="does not divide the 12 ranks"):
        resolve(path, world_size=12)


@pytest.mark.parametrize("text", ['{"a": 1,}', "[]", '{"bf16": {}, "bf16": {}}'])
def test_not_a_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_config(path)


def test_missing_file_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ep8_zero2\.json"):
        read_config(tmp_path / "none.json")
