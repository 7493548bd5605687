"""One answer to "is this the same run?", and what an upgrade of transformers may change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import PreTrainedConfig

from launch.checkpoint.identity import RunIdentity, differences, listed
from model import MoEGPTConfig

HELD = RunIdentity(
    model=MoEGPTConfig.preset("tiny").to_dict(), data={"content": "abc"}, sequence_length=32, global_batch=8, seed=1,
    document_mask=False, world_size=2, ep_size=2, zero_stage=2, dtype="bfloat16",
)  # fmt: skip


def test_differences_by_path() -> None:
    assert differences({"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 1, "c": [2]}, "e": 0}) == [
        "a.c: [1] -> [2]", "d: 0 -> null", "e: null -> 0"
    ]  # fmt: skip
    assert listed([str(n) for n in range(7)]) == "0; 1; 2; 3; 4; and 2 more"


def test_it_reads_back_as_itself() -> None:
    assert RunIdentity.from_json({}) == RunIdentity(model={})
    read = RunIdentity.from_json({**json.loads(json.dumps(HELD.to_json())), "command": ["train"]})
    assert read.to_json() == HELD.to_json() and not read.conflicts(HELD)


@pytest.mark.parametrize(
    "name, value",
    [("seed", 2), ("sequence_length", 64), ("global_batch", 16), ("document_mask", True), ("data", {"content": "abd"})],
)
def test_content_is_a_conflict(name: str, value: object) -> None:
    (found,) = HELD.conflicts(replace(HELD, **{name: value}))
    assert found.startswith(name)
    assert not HELD.conversions(replace(HELD, **{name: value}))


def test_another_content_is_said_in_words_and_not_beside_another_length() -> None:
    """The fingerprint is of the samples: whoever asked for a shorter context read first that the data was another."""
    other = replace(HELD, data={"content": "abd"})
    assert HELD.conflicts(other) == ["data.content: other shards, weights or order of --data"]
    assert HELD.conflicts(replace(other, sequence_length=16)) == ["sequence_length: 32 -> 16"]


def test_layout_is_a_conversion_and_no_conflict() -> None:
    other = replace(HELD, world_size=4, ep_size=1, zero_stage=1, dtype="float32")
    assert not HELD.conflicts(other)
    assert HELD.conversions(other) == [
        "dtype: \"bfloat16\" -> \"float32\"", "ep_size: 2 -> 1", "world_size: 2 -> 4", "zero_stage: 2 -> 1"
    ]  # fmt: skip


@pytest.mark.parametrize("field", sorted(name for name in MoEGPTConfig.__annotations__ if name != "use_cache"))
def test_every_field_of_ours_counts(field: str) -> None:
    other = replace(HELD, model={**HELD.model, field: "another"})
    assert [found.split(":")[0].split(".")[:2] for found in HELD.conflicts(other)] == [["model", field]]


def test_what_only_transformers_knows_does_not_count() -> None:
    """Every field of its base class may come, go or change with an upgrade."""
    theirs = {name for name in PreTrainedConfig().to_dict() if name not in MoEGPTConfig.__annotations__} | {"use_cache"}
    assert {"transformers_version", "dtype", "use_cache"} <= theirs
    changed = {**HELD.model, **dict.fromkeys(theirs, "another"), "born_in_transformers_6": True}
    without = {name: value for name, value in HELD.model.items() if name not in theirs}
    assert not HELD.conflicts(replace(HELD, model=changed)) and not HELD.conflicts(replace(HELD, model=without))


def test_a_field_younger_than_the_checkpoint_counts_as_its_default() -> None:
    old = {name: value for name, value in HELD.model.items() if name != "z_loss_weight"}
    assert not replace(HELD, model=old).conflicts(HELD)
    (found,) = replace(HELD, model=old).conflicts(replace(HELD, model={**HELD.model, "z_loss_weight": 0.1}))
    assert found == "model.z_loss_weight: 0.0 -> 0.1"
