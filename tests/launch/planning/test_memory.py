"""The plan's memory and traffic against what a real DeepSpeed engine holds and sends on a CPU, within 10 %."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from planner_job import job

from launch.engine import strategy
from launch.planning.activations import kept_activations
from launch.planning.communication import groups, traffic
from launch.planning.devices import find_device
from launch.planning.expectation import memory_line
from launch.planning.job import Job, job_from
from launch.planning.memory import plan_memory, remaining_gradients
from launch.planning.search import candidate
from launch.planning.time import HELD_BYTES, optimizer_seconds
from model.accounting import count_parameters
from model.config_json import PRESETS_FOLDER
from model.sizes import ModelSizes

TOLERANCE = 0.10  # of what is measured
#: Small buckets, so that they do not outweigh the model.
BUCKET = 1_000_000


def preset(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((PRESETS_FOLDER / f"{name}.json").read_text()), **changes}


MODELS = {
    "tiny": preset("tiny"),
    "60m": preset("60m"),
    # All of 800m's widths; 24 layers with their state are more than a shared CPU has.
    "800m, 2 layers": preset("800m", num_hidden_layers=2, vocab_size=8192),
    # One matrix is embedding and head, and twice as large as all the rest.
    "tied": preset("tiny", num_hidden_layers=1, vocab_size=8192, tie_word_embeddings=True),
    "tied, deep": preset("tiny", vocab_size=2048, tie_word_embeddings=True),
}
STATES_IN_BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
SGD = {"type": "SGD", "params": {"lr": 0.1}}
MOMENTUM = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
AMSGRAD = {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True, "amsgrad": True}}


def case(
    model: str, *, stage: int, ranks: int, experts: int = 1, dtype: str = "bf16", mode: str = "none", **more: Any
) -> dict[str, Any]:
    config = strategy.read_config(strategy.CONFIG_FOLDER / "cpu_ep2_zero2.json")
    config.update(train_batch_size="auto", train_micro_batch_size_per_gpu=more.get("micro_batch", 2))
    config["gradient_accumulation_steps"] = more.get("accumulation", 1)
    config["zero_optimization"].update(
        stage=stage, reduce_bucket_size=more.get("bucket", BUCKET), overlap_comm=more.get("overlap", False)
    )
    if stage == 3:
        config["zero_optimization"].pop("allgather_bucket_size")
        config["zero_optimization"].pop("reduce_scatter")
    config["expert_parallel"]["autoep_size"] = experts
    config["activation_checkpointing"]["mode"] = mode
    config["bf16"]["enabled"] = dtype != "fp32"  # "all bf16": the sums of gradients too
    config.update(more.get("sections", {}))
    if stage == 0 or dtype == "all bf16":
        del config["data_types"]  # DeepSpeed sums in the weights' type there
    return {"model": MODELS[model], "deepspeed": config, "sequence_length": more.get("length", 256), "ranks": ranks}


def planned(one: dict[str, Any]) -> Job:
    """By the way that `launch/plan.py` goes."""
    sizes = ModelSizes.of(one["model"])
    resolved = strategy.resolve_config(
        one["deepspeed"], Path("case.json"), world_size=one["ranks"], num_experts=sizes.n_routed_experts, max_steps=100
    )
    return job_from(sizes, resolved, ranks=one["ranks"], ranks_per_node=one["ranks"], sequence_length=one["sequence_length"])


def measured(nursery: Nursery, cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    files = folder / "cases.json", folder / "results.json"
    ranks = nursery.start(cases[0]["ranks"], "tests/launch/planning/engine_memory_worker.py", *files, log=folder / "log")
    assert not any(ranks.wait(3000)), ranks.text()[-3000:]
    results = json.loads((folder / "results.json").read_text())
    for one, result in zip(cases, results, strict=True):
        assert "error" not in result, (one, result)
    return results


def compare(nursery: Nursery, cases: list[dict[str, Any]], folder: Path) -> list[str]:
    """What is off by more than `TOLERANCE`, in words; empty where nothing is."""
    off = []
    for one, found in zip(cases, measured(nursery, cases, folder), strict=True):
        for name, (plan, real) in pairs(planned(one), found).items():
            line = f"{describe(one)}: {name} planned {plan / 1e6:.2f} MB, measured {real / 1e6:.2f} MB, {plan / real - 1:+.1%}"
            print(line)
            if plan != pytest.approx(real, rel=TOLERANCE):
                off.append(line)
    return off


def pairs(job: Job, found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(planned, measured) by part."""
    memory, kept = plan_memory(job, on_gpu=False), kept_activations(job, kernels=False)
    both = {
        "weights": (memory.weights, found["weights"]),
        "optimizer": (memory.optimizer, found["optimizer"]),
        "peak": (memory.live, found["most"]),
    }
    if job.zero_stage < 3:  # there the forward holds gathered weights as well, and buckets lie between steps
        both["activations"] = (kept.held + kept.loss_kept, found["activations"])
        both["states and gradients"] = (memory.weights + memory.optimizer + remaining_gradients(job), found["before_step"])
    both.update(sent(job, found["traffic"]))
    return both


def sent(job: Job, counted: dict[str, int]) -> dict[str, tuple[float, float]]:
    """(planned, counted) bytes of the collectives that one rank takes part in."""
    planned = {one.kind: one.bytes for one in traffic(job, find_device("h200"))}
    both = {}
    if job.ep_size > 1:  # what is counted has the rows that stay here
        leave = (job.ep_size - 1) / job.ep_size
        both["expert rows"] = (planned["expert rows"], counted["all_to_all_single"] * leave)
    if job.zero_stage < 3 and job.ranks > 1:  # a ring of N sends 2 (N - 1) / N of what is reduced
        reduced = planned["dense gradients"] / (2 * (job.ranks - 1) / job.ranks)
        if "expert gradients" in planned:
            copies = job.ranks / job.ep_size
            reduced += planned["expert gradients"] / (2 * (copies - 1) / copies)
        else:  # reduced by each rank with itself
            reduced += job.expert_parameters * job.weight_bytes * (job.accumulation_steps if job.zero_stage == 2 else 1)
        both["gradients reduced"] = (reduced, counted["all_reduce"])
    return both


def describe(one: dict[str, Any]) -> str:
    config, model = one["deepspeed"], next(name for name, fields in MODELS.items() if fields == one["model"])
    zero = config["zero_optimization"]
    return (
        f"{model}, {one['ranks']} ranks, EP {config['expert_parallel']['autoep_size']}, ZeRO {zero['stage']}, "
        f"{'bf16' if config['bf16']['enabled'] else 'fp32'}, {config['activation_checkpointing']['mode']}, "
        f"{config['train_micro_batch_size_per_gpu']} x {config['gradient_accumulation_steps']}"
    )


def test_one_rank(nursery: Nursery, tmp_path: Path) -> None:
    cases = [case("tiny", stage=2, ranks=1, mode=mode) for mode in ("none", "selective", "full")]
    cases.append(case("tiny", stage=3, ranks=1, dtype="fp32", accumulation=2))
    cases += [case("tiny", stage=0, ranks=1, dtype=dtype) for dtype in ("bf16", "fp32")]
    assert not compare(nursery, cases, tmp_path)


@pytest.mark.slow
def test_a_tied_head(nursery: Nursery, tmp_path: Path) -> None:
    cases = [case("tied", stage=2, ranks=1, bucket=20_000_000, micro_batch=micro, accumulation=2) for micro in (1, 4)]
    cases += [case("tied", stage=stage, ranks=1) for stage in (1, 2, 3)]
    cases.append(case("tied, deep", stage=2, ranks=1, micro_batch=4))
    assert not compare(nursery, cases, tmp_path)


@pytest.mark.slow
def test_other_optimizers(nursery: Nursery, tmp_path: Path) -> None:
    muon, kept = strategy.read_config(strategy.CONFIG_FOLDER / "ep8_zero2_muon.json")["optimizer"], STATES_IN_BF16
    layouts = ((2, "bf16"), (2, "fp32"), (2, "all bf16"), (1, "all bf16"))
    cases = [case("tiny", stage=stage, ranks=1, dtype=dtype, sections={"optimizer": muon}) for stage, dtype in layouts]
    cases += [case("tiny", stage=stage, ranks=1, dtype="all bf16", sections={"bf16": kept}) for stage in (1, 2, 3)]
    for optimizer in (SGD, MOMENTUM, AMSGRAD):
        cases.append(case("tiny", stage=2, ranks=1, sections={"optimizer": optimizer, "zero_allow_untested_optimizer": True}))
    assert not compare(nursery, cases, tmp_path)


@pytest.mark.slow
def test_two_ranks(nursery: Nursery, tmp_path: Path) -> None:
    cases = [
        case("tiny", stage=1, ranks=2, experts=2, accumulation=2),
        case("tiny", stage=2, ranks=2, experts=2, dtype="fp32", mode="full"),
        case("tiny", stage=3, ranks=2, experts=2),
        case("tiny", stage=0, ranks=2, accumulation=2),
        case("tiny", stage=0, ranks=2, experts=2, dtype="fp32"),
    ]
    assert not compare(nursery, cases, tmp_path)


@pytest.mark.parametrize(
    ("stage", "dtype", "sections", "measured"),
    [
        (2, "bf16", {"optimizer": {"type": "Muon"}}, 51.20),  # matrices 4 and 2 bytes, embedding and head 12
        (2, "fp32", {"optimizer": {"type": "Muon"}}, 59.87),
        (1, "all bf16", {"optimizer": {"type": "Muon"}}, 51.20),
        (2, "bf16", {"optimizer": {"type": "SGD"}}, 25.73),
        (2, "bf16", {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, 51.47),
        (2, "bf16", {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, 102.94),
        (3, "all bf16", {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}, 38.60),
    ],
)
def test_the_state_of_other_optimizers(stage: int, dtype: str, sections: dict[str, Any], measured: float) -> None:
    """In MB, as `test_other_optimizers` has measured it."""
    sections = {**sections, "bf16": {"enabled": dtype != "fp32", **sections.get("bf16", {})}}
    job = planned(case("tiny", stage=stage, ranks=1, dtype=dtype, sections=sections))
    assert plan_memory(job).optimizer == pytest.approx(measured * 1e6, rel=0.001)
    offloaded = plan_memory(dataclasses.replace(job, offloads_optimizer=True))
    assert offloaded.host == pytest.approx(measured * 1e6 + job.local_parameters * job.master_bytes, rel=0.001)


@pytest.mark.parametrize(
    ("model", "bucket", "micro_batch", "accumulation", "measured"),
    [
        ("tied", 20_000_000, 4, 2, 122.53),  # 412.5 where two heads are counted
        ("tied, deep", 1_000_000, 4, 1, 141.39),  # no layer's gradient waits for the head's, which lies beside the bucket
    ],
)
def test_a_tied_head_is_one_matrix(model: str, bucket: int, micro_batch: int, accumulation: int, measured: float) -> None:
    """In MB, as `test_a_tied_head` has measured it."""
    job = planned(case(model, stage=2, ranks=1, bucket=bucket, micro_batch=micro_batch, accumulation=accumulation))
    assert plan_memory(job, on_gpu=False).live == pytest.approx(measured * 1e6, rel=0.006)


def test_a_card_that_cannot_build_the_model_does_not_fit_it() -> None:
    """`4b` with its experts on eight ranks trains in less than the whole model in fp32, which each builds first."""
    spread = job("4b", micro_batch_size=4, activation_checkpointing="full")
    memory, count = plan_memory(spread), count_parameters(spread.sizes)
    whole = 4 * (count.total + count.routed_experts / 8)
    assert memory.build > 0 and memory.live + memory.build == pytest.approx(whole)
    assert memory.live < 0.8 * whole and memory.total == pytest.approx(whole + memory.runtime)
    assert memory.worst == 0  # three times the rows are less than the build too
    line = memory_line(spread, 6.5e9, on_gpu=True)
    assert f"{memory.live / 1e9:,.2f} GB of tensors by the plan, allocated at most 6.50 GB in the rehearsal" in line
    on_cpu = plan_memory(spread, on_gpu=False)
    assert f"{whole / 1e9:,.2f} GB" in memory_line(spread, 0.0, on_gpu=False) and on_cpu.build > 0
    card = dataclasses.replace(find_device("h200"), memory_gib=(memory.live + memory.runtime + 1e9) / 2**30)
    assert not candidate(spread, card).fits
    alone = plan_memory(job("4b", ranks=1, ranks_per_node=1, ep_size=1))
    assert alone.build == 0 and alone.live > 3 * whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith("tied")])
def test_every_layout(nursery: Nursery, model: str, ranks: int, tmp_path: Path) -> None:
    """Stages x precisions x recomputation x EP."""
    expert_ranks = [1] if ranks == 1 else [1, 2]
    layouts = itertools.product((1, 2, 3), ("bf16", "fp32"), ("none", "selective", "full"), expert_ranks)
    cases = [
        case(model, stage=stage, ranks=ranks, experts=experts, dtype=dtype, mode=mode, micro_batch=2 if model == "tiny" else 1)
        for stage, dtype, mode, experts in layouts
    ]
    assert not compare(nursery, cases, tmp_path)


@pytest.mark.parametrize(("dtype", "state", "again"), [("bf16", 12, 4), ("fp32", 8, 0)])
def test_without_zero_a_rank_has_the_state_of_all_that_it_holds(dtype: str, state: int, again: int) -> None:
    """On two real ranks 77.2 and 51.5 MB; the step is twice the arithmetic of ZeRO's, which shares it out."""
    job = planned(case("tiny", stage=0, ranks=2, dtype=dtype))
    memory = plan_memory(job)
    assert memory.optimizer == job.local_parameters * state == pytest.approx({12: 77.2e6, 8: 51.5e6}[state], rel=0.001)
    assert memory.step == job.local_parameters * again  # each master's gradient in fp32; fp32 weights have theirs
    h200, sharded = find_device("h200"), planned(case("tiny", stage=1, ranks=2, dtype=dtype))
    passes, shared = (optimizer_seconds(one, h200) - held_bytes(one) / h200.memory_speed for one in (job, sharded))
    assert passes == pytest.approx(2 * shared)


def held_bytes(job: Job) -> float:
    return HELD_BYTES * job.local_parameters * job.accumulation_steps


def test_stage_3_gathers_what_other_ranks_hold() -> None:
    def planned_bytes(**changes: Any) -> tuple[float, float]:
        memory = plan_memory(job(zero_stage=3, **changes))
        return memory.weights, memory.gathered

    eight, four = job(), job(ep_size=4)
    assert planned_bytes() == (2 * eight.shard, 2 * eight.dense_parameters), "each rank has its own expert alone"
    assert planned_bytes(ep_size=4) == (2 * four.shard, 2 * (four.dense_parameters + four.expert_parameters))
    assert planned_bytes(live_parameters=1000)[1] == 2 * 1000
    assert planned_bytes(ranks=1, ep_size=1)[1] == 0


def test_stage_3_gathers_into_a_buffer_beside_its_bucket() -> None:
    """From which the weights are copied out: with short samples that is the fullest moment, in bf16."""

    sizes: dict[str, Any] = {"prefetched": 500_000_000, "bucket_elements": 200_000_000}
    memory = plan_memory(job("4b", zero_stage=3, micro_batch_size=1, sequence_length=128, **sizes))
    always = memory.weights + memory.optimizer + memory.gradients + memory.gathered + memory.activations
    assert memory.live == pytest.approx(always + 2 * 500_000_000 + 2 * 200_000_000)


def test_gradients_by_stage_and_what_they_are_summed_in() -> None:
    """In bf16 with sums in fp32 or in bf16; Muon's updates and next momentum lie beside sums in the weights' type."""
    held, shard, matrices = job().local_parameters, job().shard, job().shard - job().embeddings / 8
    assert plan_memory(job()).gradients == 4 * shard and plan_memory(job(offloads_optimizer=True)).gradients == 0
    assert [plan_memory(job(zero_stage=1, gradient_bytes=size)).gradients for size in (2, 4)] == [2 * held, 6 * held]
    in_bf16: dict[str, Any] = {"gradient_bytes": 2, "optimizer": "Muon"}
    assert remaining_gradients(job(zero_stage=1, gradient_bytes=2)) == 2 * shard
    assert remaining_gradients(job(zero_stage=1, **in_bf16)) == pytest.approx(2 * shard + 4 * matrices)
    assert remaining_gradients(job(zero_stage=0, **in_bf16)) == 2 * held + 4 * (held - job().embeddings)
    muon = plan_memory(job(zero_stage=1, optimizer="Muon")).optimizer  # momentum in the sums' fp32
    assert muon == pytest.approx(12 * shard - 4 * matrices)


def test_gradients_of_the_weights_type_wait_between_micro_steps() -> None:
    """Where stage 1 sums apart: from the second on they are there when a backward begins, its fullest moment."""
    small: dict[str, Any] = {"zero_stage": 1, "bucket_elements": 1_000_000}
    alone, several = (plan_memory(job(accumulation_steps=number, **small)).live for number in (1, 4))
    assert several - alone == pytest.approx(2 * job().local_parameters)


def test_when_the_first_bucket_is_full_of_the_head_no_layer_has_gone() -> None:
    """Stage 2 makes room for its shard's gradients then: as full as a backward that begins with them there."""
    given: dict[str, Any] = {"bucket_elements": 49_152 * 1536, "activation_checkpointing": "full"}
    once, again = (plan_memory(job(accumulation_steps=number, **given)).live for number in (1, 4))
    assert once == again


def test_with_short_samples_the_end_or_the_step_is_the_fullest() -> None:
    """When the sums of stage 1 are made; when Adam without its kernel steps, which no bucket's content lives to see."""
    short: dict[str, Any] = {"micro_batch_size": 1, "sequence_length": 128, "bucket_elements": 1_000_000}
    end = plan_memory(job(zero_stage=1, **short))
    assert end.live == pytest.approx(end.weights + end.optimizer + end.gradients + end.buckets)
    step = plan_memory(job("4b", fused_optimizer=False, **short))
    assert step.live == pytest.approx(step.weights + step.optimizer + step.gradients + step.step)


def test_what_is_copied_on_the_gradients_way() -> None:
    """Two buckets of 200 million in bf16, and by stage what is flat beside them."""
    ours, small, large = job(), job("60m", ep_size=1), job("4b", ep_size=1, zero_stage=1)
    head = 49_152 * 1536
    assert ours.local_parameters > 200_000_000 > max(head, small.local_parameters)
    assert large.expert_parameters > 500_000_000 > ours.dense_parameters > ours.expert_parameters
    assert plan_memory(ours).buckets == 2 * 2 * 200_000_000 + 2 * 200_000_000 + 4 * head
    small_head = small.sizes.vocab_size * small.sizes.hidden_size
    assert plan_memory(small).buckets == 2 * 2 * 200_000_000 + 2 * small.local_parameters + 4 * small_head
    assert plan_memory(job(zero_stage=1)).buckets == (4 + 2) * ours.dense_parameters
    assert plan_memory(large).buckets == (4 + 2) * 500_000_000
    assert plan_memory(job(zero_stage=1, gradient_bytes=2)).buckets == 2 * 2 * 200_000_000 + 4 * ours.shard
    assert plan_memory(job(zero_stage=3)).buckets == 2 * 200_000_000


def test_a_steps_temporaries_are_of_one_group_after_the_other() -> None:
    """Dense parameters and experts, in fp32: flat where sums are not apart, and Adam's root and quotient without its kernel."""
    group = max(job().dense_parameters, 8 * job().expert_parameters) / 8

    def step(**changes: Any) -> float:
        return plan_memory(job(**changes)).step

    assert (step(), step(fused_optimizer=False)) == (0, 4 * 2 * group)
    assert (step(zero_stage=3), step(zero_stage=3, fused_optimizer=False)) == (4 * group, 4 * 3 * group)
    assert step(zero_stage=3, offloads_optimizer=True) == 0
    assert step(optimizer="Muon", fused_optimizer=False) == 4 * 2 * job().embeddings / 8


def test_what_comes_on_top_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context and fragments; and where routing goes wrong at most all rows of an expert group."""
    memory, rows = plan_memory(job()), 8 * 2048 * 2 * 1536 * 2
    assert memory.runtime == pytest.approx(1.5e9 + 0.04 * memory.live)
    assert memory.exchange == rows and plan_memory(job(), on_gpu=False).exchange == 2 * rows
    worst = {ranks: plan_memory(job(ep_size=ranks)).worst for ranks in (1, 2, 8)}
    assert worst[1] == 0 < worst[2] < worst[8]
    even, twice = (kept_activations(job(ep_size=2), kernels=True, load=load) for load in (1.0, 2.0))
    more = twice.held + twice.recomputed + twice.working - even.held - even.recomputed - even.working
    assert worst[2] == pytest.approx(more + rows)
    monkeypatch.setattr("launch.planning.memory.WORST_LOAD", 2.0)
    assert plan_memory(job(ep_size=2)).worst == worst[2] and plan_memory(job()).worst < worst[8]


def test_expert_parallel_rank_holds_its_share_of_the_experts() -> None:
    whole, half = planned(case("tiny", stage=2, ranks=2)), planned(case("tiny", stage=2, ranks=2, experts=2))
    experts = 4 * 8 * 3 * 256 * 128  # layers x experts x matrices of tiny
    assert whole.local_parameters - half.local_parameters == experts // 2
    assert [group.size for group in groups(half)] == [2, 1, 2]
