"""A plan refuses a key that nobody reads as training does, and imports neither DeepSpeed nor torch for it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from data.cli import UserError
from launch.engine.strategy import CONFIG_FOLDER, read_config
from launch.planning import unread
from launch.planning.unread import check_unread

BASE = read_config(CONFIG_FOLDER / "ep8_zero2.json")
PATH = Path("some.json")


def renamed(dotted: str, wrong: str) -> dict[str, Any]:
    config = copy.deepcopy(BASE)
    *outer, key = dotted.split(".")
    section = config
    for name in outer:
        section = section[name]
    section[wrong] = section.pop(key)
    return config


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.json")), ids=lambda p: p.name)
def test_strategies_of_ours_need_no_source(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "words_of_sources", lambda names: set())
    assert check_unread(read_config(path), path) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("gradient_clipping", "gradient_cliping"),
        ("train_batch_size", "train_batch_sise"),
        ("zero_optimization", "zero_optimisation"),
        ("optimizer.params", "parms"),
        ("optimizer.params.weight_decay", "weight_decy"),
        ("scheduler.params.cos_min_ratio", "cos_min_ration"),
        ("scheduler.params.warmup_num_steps", "warmup_steps"),
        ("zero_optimization.overlap_comm", "overlap_com"),  # a part of a word that is there
        ("zero_optimization.reduce_bucket_size", "Reduce_bucket_size"),
    ],
)
def test_a_key_that_stands_in_no_source_is_refused_with_the_right_one(right: str, wrong: str) -> None:
    whole = ".".join([*right.split(".")[:-1], wrong])
    with pytest.raises(UserError) as caught:
        check_unread(renamed(right, wrong), PATH)
    end = f'which neither DeepSpeed nor this system reads; did you mean "{right.split(".")[-1]}"?'
    assert str(caught.value) == f'some.json: unknown key "{whole}", {end}'


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("optimizer.params.fused", "fuse"),
        ("bf16.enabled", "enable"),
        ("activation_checkpointing.mode", "mod"),
    ],
)
def test_a_slip_that_is_a_word_of_the_sources_is_doubted(right: str, wrong: str) -> None:
    (doubt,) = check_unread(renamed(right, wrong), PATH)
    whole = ".".join([*right.split(".")[:-1], wrong])
    assert doubt.startswith(f'some.json: no file of ds_configs/ has "{whole}"; did you mean "{right.split(".")[-1]}"? Training')


@pytest.mark.parametrize(
    ("right", "wrong", "meant"),
    [
        ("zero_optimization.stage", "zero_stage", "zero_optimization.stage"),
        ("optimizer.params.lr", "learning_rate", "optimizer.params.lr"),
        ("optimizer.params.weight_decay", "decay", "optimizer.params.weight_decay"),
    ],
)
def test_another_systems_name_for_a_key_is_doubted(right: str, wrong: str, meant: str) -> None:
    (doubt,) = check_unread(renamed(right, wrong), PATH)
    assert f'has "{".".join([*right.split(".")[:-1], wrong])}"; did you mean "{meant}"?' in doubt


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("", "lr", "optimizer.params.lr"),
        ("", "stage", "zero_optimization.stage"),
        ("", "max_grad_norm", "gradient_clipping"),
        ("zero_optimization", "gradient_clipping", "gradient_clipping"),
        ("optimizer.params", "warmup_num_steps", "scheduler.params.warmup_num_steps"),
    ],
)
def test_a_key_in_the_wrong_place_is_doubted(section: str, key: str, meant: str) -> None:
    config = copy.deepcopy(BASE)
    inner = config
    for name in section.split(".") if section else []:
        inner = inner[name]
    inner[key] = 1
    (doubt,) = check_unread(config, PATH)
    assert f'"; did you mean "{meant}"?' in doubt


def test_other_systems_names_lead_to_keys_that_there_are() -> None:
    known = unread.known_keys()
    assert all(dotted.rpartition(".")[2] in known[dotted.rpartition(".")[0]] for dotted in unread.ELSEWHERE.values())


@pytest.mark.parametrize("empty", [False, True])
def test_without_sources_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    """Not installed, or as a stripped image has it: compiled files alone."""
    monkeypatch.setattr(unread, "_folder", lambda package, *inner: tmp_path if empty else None)
    (doubt,) = check_unread(renamed("gradient_clipping", "gradient_cliping"), PATH)
    assert "gradient_cliping" in doubt


def test_the_command_refuses_and_doubts(tmp_path: Path) -> None:
    """And without DeepSpeed's import, which the sources are read in the place of."""
    path = tmp_path / "some.json"
    code = (
        "import sys; from launch.planning.answer import answer; from launch.planning.arguments import parse_arguments\n"
        "from data.cli import UserError; from launch.planning.show import show\n"
        "try: print(show(answer(parse_arguments(sys.argv[1:])), with_curve=False))\n"
        "except UserError as error: print(error)\n"
        "assert not {'deepspeed', 'torch'} & sys.modules.keys()"
    )

    def said(config: dict[str, Any]) -> str:
        path.write_text(json.dumps(config))
        flags = ["--gpu", "h200", "--num_gpus", "8", "--deepspeed_config", str(path)]
        done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    assert "warning" not in said(BASE)
    assert 'unknown key "gradient_cliping"' in said(renamed("gradient_clipping", "gradient_cliping"))
    assert f"warning: {path}: no file of ds_configs/ has" in said(renamed("optimizer.params.fused", "fuse"))
