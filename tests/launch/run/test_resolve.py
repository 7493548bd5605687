"""What a command line becomes: every flag that decides what is trained is in the run, and in what its checkpoints belong to."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from support import OLD, ROOT

from data.cli import UserError
from launch.engine.strategy import CONFIG_FOLDER, read_config
from launch.run.arguments import parse_arguments
from launch.run.folder import changed_settings
from launch.run.resolve import ResolvedRun, resolve_run, resolve_settings
from launch.run.session import identify

RANKS = 2
FLAGGED = ("activation_checkpointing", "compile")


def command(tmp_path: Path, *more: object, data: object = OLD / "tokens", config: Path = OLD / "deepspeed.json") -> list[str]:
    flags = ("--data", data, "--model", OLD / "model.json", "--output", tmp_path / "run", "--deepspeed_config", config)
    return [str(flag) for flag in (*flags, "--sequence_length", 32, "--max_steps", 12, *more)]


def resolved(arguments: list[str]) -> tuple[ResolvedRun, dict[str, Any]]:
    parsed = parse_arguments(arguments)
    run = resolve_run(parsed, RANKS)
    return run, identify(parsed, run).to_json()


def other_batch(tmp_path: Path) -> Path:
    config = json.loads((OLD / "deepspeed.json").read_text())
    path = tmp_path / "other.json"
    path.write_text(json.dumps(config | {"train_batch_size": 16, "gradient_accumulation_steps": 4}))
    return path


@pytest.mark.parametrize("changed", ["seed", "sequence_length", "document_mask", "data", "global_batch", "model"])
def test_what_decides_a_step_makes_it_another_run(changed: str, tmp_path: Path) -> None:
    """A run that goes on with another of these trains on other samples, or on the same ones twice, and no loss shows it."""
    others = {
        "seed": command(tmp_path, "--seed", 7),
        "sequence_length": command(tmp_path, "--sequence_length", 16),
        "document_mask": command(tmp_path, "--document_mask"),
        "data": command(tmp_path, data=f"{OLD / 'tokens'}:0.5"),
        "global_batch": command(tmp_path, config=other_batch(tmp_path)),
        "model": command(tmp_path, "--rope_factor", 3),
    }
    (_, one), (_, other) = resolved(command(tmp_path)), resolved(others[changed])
    differing = {name for name in one if one[name] != other[name]}
    assert differing == ({"data", changed} if changed == "sequence_length" else {changed})


def test_the_run_is_what_the_flags_say(tmp_path: Path) -> None:
    run, identity = resolved(command(tmp_path, "--seed", 7, "--document_mask"))
    validation = run.validation_data
    assert validation is not None and (run.train_data.split, validation.split) == ("train", "validation")
    for data in (run.train_data, validation):
        assert data.sequence_length == 32 and data.document_mask
    assert run.train_data.seed == 7 and run.deepspeed["scheduler"]["params"]["total_num_steps"] == 12
    assert {name: identity[name] for name in ("world_size", "ep_size", "zero_stage", "dtype", "global_batch", "seed")} == {
        "world_size": 2, "ep_size": 2, "zero_stage": 2, "dtype": "bfloat16", "global_batch": 8, "seed": 7,
    }  # fmt: skip
    assert resolved(command(tmp_path, "--eval_interval", 0))[0].validation_data is None


@pytest.mark.parametrize("section", [{}, {"activation_checkpointing": {"mode": "none", "cpu_checkpointing": True}}])
def test_a_flag_that_has_a_key_in_the_json_is_that_key(section: dict[str, Any], tmp_path: Path) -> None:
    """Where it lay beside the JSON, a resume in another mode did not say so, and each reader had to ask for both."""
    given = {key: value for key, value in json.loads((OLD / "deepspeed.json").read_text()).items() if key not in FLAGGED}
    (tmp_path / "given.json").write_text(json.dumps(given | section))
    flags = (("--activation_checkpointing", "full"), ("--compile",), ())
    full, compiled, plain = (resolved(command(tmp_path, *each, config=tmp_path / "given.json"))[0] for each in flags)
    assert full.deepspeed["activation_checkpointing"] == {**section.get("activation_checkpointing", {}), "mode": "full"}
    assert (full.strategy.activation_checkpointing, full.strategy.compiles) == ("full", False)
    assert (compiled.strategy.activation_checkpointing, compiled.strategy.compiles) == ("none", True)
    (tmp_path / "config.json").write_text(json.dumps({"deepspeed": full.deepspeed}))
    assert [len(changed_settings(tmp_path, run.deepspeed, deterministic=False)) for run in (plain, full)] == [1, 0]
    old = {"deepspeed": plain.deepspeed, "arguments": {"activation_checkpointing": "full"}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert [len(changed_settings(tmp_path, run.deepspeed, deterministic=False)) for run in (plain, full)] == [1, 0]


def test_the_end_of_a_text_is_the_tokenizers(tmp_path: Path) -> None:
    """The model's file says none: an export of it would not know where to stop."""
    assert json.loads((OLD / "model.json").read_text())["eos_token_id"] is None
    run, _ = resolved(command(tmp_path))
    assert run.model.eos_token_id == json.loads((OLD / "tokens" / "manifest.json").read_text())["tokenizer"]["eos_token_id"] == 0


@pytest.mark.parametrize(("stage", "refused"), [(0, True), (1, False), (2, False), (3, False)])
def test_fp16_without_zero_is_refused_at_the_start(stage: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trained to the end, and its first save ended the run."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    settings = json.loads((ROOT / "tests" / "fixtures" / "fp16.json").read_text()) | {"zero_optimization": {"stage": stage}}
    flags: Any = SimpleNamespace(max_steps=9, compile=None, activation_checkpointing=None, document_mask=False)
    said = pytest.raises(UserError, match=r"fp16\.enabled needs zero_optimization\.stage 1, 2 or 3") if refused else nullcontext()
    with said:
        resolve_settings(settings, Path("fp16.json"), flags, world_size=1, num_experts=4)


def test_sums_of_another_dtype_without_zero_are_refused_at_the_start() -> None:
    """`ep8_zero2.json` with its stage set to 0 alone ended in the engine, with a traceback."""
    settings = read_config(CONFIG_FOLDER / "ep8_zero2.json") | {"zero_optimization": {"stage": 0}}
    flags: Any = SimpleNamespace(max_steps=9, compile=None, activation_checkpointing=None, document_mask=False)
    with pytest.raises(UserError, match=r"grad_accum_dtype must be left out with zero_optimization\.stage 0, not \"fp32\""):
        resolve_settings(settings, Path("j.json"), flags, world_size=8, num_experts=8)
    del settings["data_types"]
    assert resolve_settings(settings, Path("j.json"), flags, world_size=8, num_experts=8)["zero_optimization"]["stage"] == 0
