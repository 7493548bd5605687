"""Layouts that the search proposes: they fit, keep the batch, and come back from the JSON that is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.engine import strategy
from launch.nested import differing
from launch.planning.devices import find_device
from launch.planning.job import Job, job_from
from launch.planning.scale import COUNTS, curve
from launch.planning.search import Candidate, _order, as_deepspeed, candidate, changes, least_change, search, variants
from model.config_json import load_sizes


def planned(model: str, file: str, *, gpus: int = 8, nodes: int = 1, length: int = 2048, **sections: object) -> Job:
    sizes, path = load_sizes(model), strategy.CONFIG_FOLDER / file
    config = {**strategy.read_config(path), **sections}
    resolved = strategy.resolve_config(config, path, world_size=gpus * nodes, num_experts=sizes.n_routed_experts, max_steps=10)
    return job_from(sizes, resolved, ranks=gpus * nodes, ranks_per_node=gpus, sequence_length=length)


@pytest.mark.parametrize("gpu", ["a100-40gb", "rtx-4090", "h200"])
def test_what_is_proposed_fits_and_nothing_that_fits_is_faster(gpu: str) -> None:
    job, device = planned("800m", "ep8_zero2.json"), find_device(gpu)
    found = search(job, device)
    assert found and all(one.is_safe and one.job.global_batch == job.global_batch for one in found)
    all_that_fit = [c for c in (candidate(v, device) for v in variants(job)) if c.is_safe]
    fastest = max(c.tokens_per_second for c in all_that_fit)
    assert found[0].tokens_per_second == pytest.approx(fastest, rel=0.02)  # as fast within 1 %: the lower ZeRO stage
    assert all(c.memory.total + c.memory.worst <= 0.85 * device.memory for c in found)
    assert len({(c.job.ep_size, c.job.zero_stage, c.job.offloads_optimizer) for c in found}) == len(found)


def test_of_two_as_fast_the_simpler_comes_first() -> None:
    """Half a token a second is no reason for another ZeRO stage, nor for recomputation."""
    job, device = planned("800m", "ep8_zero2.json"), find_device("h200")

    def layout(speed: float, stage: int, mode: str, memory: float) -> Candidate:
        size: Any = SimpleNamespace(total=memory)
        time: Any = SimpleNamespace(tokens_per_second=lambda _: speed)
        one = dataclasses.replace(job, zero_stage=stage, activation_checkpointing=mode)
        return Candidate(job=one, device=device, memory=size, time=time)

    wanted = [layout(1100, 3, "full", 9), layout(1000, 1, "none", 5), layout(1000, 1, "none", 6)]
    wanted += [layout(1000.5, 1, "selective", 1), layout(1000.5, 1, "full", 1), layout(1000.5, 2, "none", 1)]
    assert sorted(wanted[::-1], key=_order) == wanted


def test_a_layout_fits_at_an_even_load_at_the_worst_or_with_a_margin() -> None:
    job, device = planned("800m", "ep8_zero2.json"), find_device("h200")
    memory = candidate(job, device).memory
    whole = memory.total + memory.worst
    assert memory.worst > 0
    found = []
    for room in (0.99 * memory.total, memory.total + memory.worst / 2, 1.01 * whole, 1.01 * whole / 0.85):
        one = candidate(job, dataclasses.replace(device, memory_gib=room / 2**30))
        found.append((one.fits, one.fits_at_worst, one.is_safe))
    assert found == [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]


def test_what_does_not_fit_is_helped_by_another_layout() -> None:
    """The 4b preset's state and activations at micro-batch 8 are beyond 40 GB; smaller micro-batches are not."""
    job, device = planned("4b", "ep8_zero2.json"), find_device("a100-40gb")
    assert not candidate(job, device).fits
    assert search(job, device)


def test_the_least_change_that_helps() -> None:
    """Nothing that fits differs in fewer decisions."""
    job, device = planned("4b", "ep8_zero2.json"), find_device("a100-40gb")
    found = least_change(job, device)
    assert found is not None and found.is_safe
    fewest = min(changes(job, v) for v in variants(job) if candidate(v, device).is_safe)
    assert changes(job, found.job) == fewest == 1
    alike = [c for c in (candidate(v, device) for v in variants(job) if changes(job, v) == fewest) if c.is_safe]
    speeds = [c.tokens_per_second for c in alike]
    assert found.tokens_per_second == max(speeds) > min(speeds)
    # The optimizer's kernel and the accumulation follow from two of them.
    smaller = dataclasses.replace(job, micro_batch_size=4, accumulation_steps=8)
    assert changes(job, dataclasses.replace(smaller, offloads_optimizer=True, fused_optimizer=False)) == 2
    assert changes(job, job) == 0 and least_change(job, find_device("b200")).job == job  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "batch",
    [
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": "auto"},
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": "auto"},
    ],
)
def test_whoever_obeys_the_changes_trains_the_batch_that_was_planned(batch: dict[str, object]) -> None:
    """Also where the accumulation does not follow from the rest of the file."""
    job = planned("800m", "ep8_zero2.json", **batch)
    base = {**strategy.read_config(strategy.CONFIG_FOLDER / "ep8_zero2.json"), **batch}
    other = candidate(dataclasses.replace(job, micro_batch_size=2, accumulation_steps=16), find_device("h200"))
    again = planned("800m", "ep8_zero2.json", **{**batch, **obeyed(base, as_deepspeed(other, base))})
    assert (again.micro_batch_size, again.accumulation_steps, again.global_batch) == (2, 16, 256) and job.global_batch == 256


@pytest.mark.parametrize(
    ("file", "changed", "keys"),
    [
        ("ep8_zero2.json", {"offloads_optimizer": True}, {"offload_optimizer", "torch_adam", "fused"}),
        ("ep8_zero2_offload.json", {"offloads_optimizer": False}, {"offload_optimizer", "torch_adam", "fused"}),
        ("ep8_zero3.json", {"zero_stage": 2}, {"stage", "reduce_scatter", "stage3_gather_16bit_weights_on_model_save"}),
        ("ep8_zero2.json", {}, set()),
    ],
)
def test_the_advice_names_every_key_that_the_written_file_changes(file: str, changed: dict, keys: set[str]) -> None:
    """Without the optimizer's two, DeepSpeed's own Adam on the card wants a compiler; with them its CPU Adam is not used."""
    base = strategy.read_config(strategy.CONFIG_FOLDER / file)
    other = candidate(dataclasses.replace(planned("800m", file), **changed), find_device("h200"))
    assert {key.rpartition(".")[2] for key in obeyed(base, as_deepspeed(other, base))} == keys


def obeyed(base: dict, written: dict) -> dict[str, object]:
    return {key: new for key, _, new in differing(base, written)}


def test_experts_are_exchanged_within_a_node() -> None:
    assert {one.ep_size for one in variants(planned("800m", "ep4_zero2.json", gpus=4, nodes=2))} == {1, 2, 4}
    assert {one.ep_size for one in variants(planned("800m", "ep8_zero2.json", gpus=8))} == {1, 2, 4, 8}


def test_a_sequence_beyond_what_a_micro_batch_should_have_is_one_alone() -> None:
    long = dataclasses.replace(planned("800m", "ep8_zero2.json"), sequence_length=131_072)
    assert {one.micro_batch_size for one in variants(long)} == {1}


def test_parameters_that_were_offloaded_stay_on_the_card() -> None:
    """The plan counts them there."""
    base = strategy.read_config(strategy.CONFIG_FOLDER / "ep8_zero3.json")
    base["zero_optimization"]["offload_param"] = {"device": "cpu"}
    for variant in variants(planned("800m", "ep8_zero3.json")):
        assert "offload_param" not in as_deepspeed(candidate(variant, find_device("h200")), base)["zero_optimization"]


def test_a_written_zero_2_has_what_autoep_wants_there() -> None:
    """Whatever a base of stage 3, which needs neither, says of it."""
    base = strategy.read_config(strategy.CONFIG_FOLDER / "ep8_zero3.json")
    base["zero_optimization"].update(reduce_scatter=False, contiguous_gradients=False)
    for variant in variants(planned("800m", "ep8_zero3.json")):
        zero = as_deepspeed(candidate(variant, find_device("h200")), base)["zero_optimization"]
        if variant.zero_stage < 3:
            assert zero["reduce_scatter"] is zero["contiguous_gradients"] is True


def test_buckets_are_those_of_each_variants_own_stage() -> None:
    """ZeRO 3 has one, whatever `overlap_comm` says; the same file at another stage two."""
    job = planned("800m", "ep8_zero3.json", zero_optimization={"stage": 3, "overlap_comm": True})
    assert job.buckets == 1
    assert {one.zero_stage: one.buckets for one in variants(job)} == {1: 2, 2: 2, 3: 1}


@pytest.mark.parametrize(
    ("file", "sections"), [("ep8_zero2.json", {"compile": {"autoep_non_moe": True}}), ("ep8_zero2_muon.json", {})]
)
def test_what_training_refuses_with_zero_3_is_not_proposed_there(file: str, sections: dict) -> None:
    """Compiled regions and Muon, on a card where stage 3 is the fastest without them."""
    device = find_device("h100-pcie")
    assert search(planned("800m", "ep8_zero2.json"), device)[0].job.zero_stage == 3
    job = planned("800m", file, **sections)
    muon = job.is_muon
    stages = {2} if muon else {1, 2}  # ZeRO 1 with sums in fp32 is BF16_Optimizer, which refuses Muon with experts
    assert {one.zero_stage for one in variants(job)} == {one.job.zero_stage for one in search(job, device)} == stages
    assert any(one.offloads_optimizer for one in variants(job)) is not muon
    if muon:
        alike = dataclasses.replace(job, gradient_bytes=job.weight_bytes)
        assert {one.zero_stage for one in variants(alike)} == {1, 2}


def test_nothing_fits_a_model_that_is_too_large() -> None:
    job = planned("4b", "ep1_zero2.json", gpus=1)
    assert all(one.job.offloads_optimizer for one in search(job, find_device("rtx-4090")))  # 61 GB of state leave the card
    deep = dataclasses.replace(job, sizes=dataclasses.replace(job.sizes, num_hidden_layers=96))
    assert not search(deep, find_device("rtx-4090"))


@pytest.mark.parametrize("file", sorted(path.name for path in strategy.CONFIG_FOLDER.glob("*.json")))
def test_a_written_json_is_read_back_as_the_same_layout(file: str) -> None:
    base = strategy.read_config(strategy.CONFIG_FOLDER / file)
    job = planned("tiny", file, length=512)
    seen = 0
    for variant in variants(job):
        config = as_deepspeed(candidate(variant, find_device("h200")), base)
        resolved = strategy.resolve_config(config, Path(file), world_size=8, num_experts=8, max_steps=10)
        again = job_from(job.sizes, resolved, ranks=8, ranks_per_node=8, sequence_length=512)
        layout = ("ep_size", "zero_stage", "offloads_optimizer", "fused_optimizer", "activation_checkpointing")
        layout += ("micro_batch_size", "accumulation_steps", "global_batch")
        assert [getattr(again, name) for name in layout] == [getattr(variant, name) for name in layout]
        seen += 1
    assert seen >= 4 * 1 * 3  # EP sizes x stages, of Muon one, x recomputation
    assert base == strategy.read_config(strategy.CONFIG_FOLDER / file)  # not changed on the way


def test_the_curve_keeps_the_batch_and_says_what_breaks() -> None:
    points = curve(planned("800m", "ep8_zero2.json"), find_device("a100-80gb"))
    assert [point.gpus for point in points] == list(COUNTS)
    speeds = [point.found.tokens_per_second for point in points]
    assert speeds == sorted(speeds)
    for point in points:
        assert point.found.job.ep_size <= min(8, point.gpus)
        assert point.found.job.global_batch == max(256, point.gpus)
    assert points[-1].breaks.startswith("batch: needs 512 sequences")
    assert points[-1].breaks == "batch: needs 512 sequences, one a GPU"
    tight = curve(planned("4b", "ep8_zero2.json"), find_device("rtx-4090"))
    assert tight[0].breaks.startswith("memory: ")


def test_the_curve_has_the_nodes_that_were_asked_for() -> None:
    """Four GPUs in a node, where the vendor's own has eight; a job of one node does not say that there are no more."""
    job, device = planned("800m", "ep4_zero2.json", gpus=4, nodes=4, length=1024), find_device("h100-80gb")
    found = {point.gpus: point.found.job for point in curve(job, device)}
    assert found[16] == dataclasses.replace(job, ranks=16)
    assert [found[n].ranks_per_node for n in (1, 2, 4, 8, 512)] == [1, 2, 4, 4, 4]
    over = planned("800m", "ep8_zero2.json", gpus=4, nodes=4, length=1024)
    assert {point.gpus: point.found.job.ep_size for point in curve(over, device)}[16] == 8, "at its own number it is the job"
    alone = {point.gpus: point.found.job for point in curve(planned("800m", "ep4_zero2.json", gpus=4), device)}
    assert [alone[n].ranks_per_node for n in (4, 8, 16)] == [4, 8, 8]
    wider = {point.gpus: point.found.job for point in curve(planned("800m", "ep4_zero2.json", gpus=4), find_device("gh200"))}
    assert wider[4].ranks_per_node == wider[8].ranks_per_node == 4  # of one GPU by the vendor


def test_the_curve_says_where_the_batch_does_not_divide() -> None:
    """252 sequences, made for seven GPUs: on eight 32 each, as a plan for eight says too, and not one micro-batch of 1."""
    job = planned("800m", "ep1_zero2.json", gpus=7, train_batch_size=252, train_micro_batch_size_per_gpu=6)
    found = {point.gpus: point for point in curve(job, find_device("h200"))}
    assert [found[n].found.job.global_batch for n in (1, 2, 4, 8, 16)] == [252, 252, 252, 256, 256]
    assert (found[8].found.job.micro_batch_size, found[8].found.job.accumulation_steps) == (4, 8)
    assert found[8].breaks == "batch: needs 256 sequences, not 252" and not found[4].breaks.startswith("batch")
