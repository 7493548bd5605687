"""Time and traffic where they can be known without the model's assumptions."""

from __future__ import annotations

import dataclasses

import pytest
from planner_job import job

from launch.planning import time
from launch.planning.communication import Group, Traffic, groups, ring_speed, traffic
from launch.planning.devices import Device, find_device
from launch.planning.time import exposed, moved_by_layer, optimizer_seconds, plan_time
from model.config_json import load_sizes


def ideal(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A card that reaches its peak, with memory, links and a host that cost nothing."""
    monkeypatch.setattr(time, "USUAL_LOAD", 1.0)
    card = find_device("h200")
    shares = dict.fromkeys(("matrix", "narrow", "head", "attention", "memory", "grouped"), 1.0)
    return dataclasses.replace(
        card,
        memory_gbs=1e15,
        efficiency=dataclasses.replace(card.efficiency, **shares),
        everywhere=dataclasses.replace(card.everywhere, host_kernel=0.0, host_step=0.0),
    )


@pytest.mark.parametrize("model", ["tiny", "60m", "800m", "4b"])
def test_an_ideal_card_reaches_all_of_its_peak(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention are counted here apart from model/accounting.py; together they must be its FLOPs."""
    sizes = load_sizes(model)
    alone = job(model, ranks=1, ep_size=1, sequence_length=sizes.max_position_embeddings)
    device = ideal(monkeypatch)
    assert plan_time(alone, device).mfu(alone, device) == pytest.approx(1.0, abs=1e-4)


def test_without_tf32_an_eighth_of_the_peak_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products run on the vector units then."""
    alone, device = job("tiny", ranks=1, ep_size=1, sequence_length=512, weight_bytes=4), ideal(monkeypatch)
    assert plan_time(alone, device).mfu(alone, device) == pytest.approx(1 / 8, abs=1e-4)


def test_one_expert_a_rank_is_a_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 800m's eight on eight ranks; on four each has two, whose product reaches half as much here."""
    whole = ideal(monkeypatch)
    half = dataclasses.replace(whole, efficiency=dataclasses.replace(whole.efficiency, grouped=0.5))
    products = {ep: [plan_time(job(ep_size=ep), device).matrix for device in (whole, half)] for ep in (8, 4)}
    assert products[8][0] == products[8][1] == products[4][0] < products[4][1]


def test_what_every_micro_step_does_is_counted_as_often() -> None:
    """By hand, for ZeRO 2 in bf16 with fp32 sums: 12 bytes of each parameter held and 14 of the shard's, and 74 once."""
    device = find_device("a100-80gb")
    seconds = [optimizer_seconds(job(accumulation_steps=n), device) * device.memory_speed for n in (1, 2, 3)]
    each = 12 * job().local_parameters + 14 * job().shard
    assert seconds == pytest.approx([n * each + 74 * job().shard for n in (1, 2, 3)])


@pytest.mark.parametrize("accumulation_steps", [1, 8])
def test_a_slow_host_sets_the_pace_and_hides_what_it_waits_for(accumulation_steps: int) -> None:
    """83 kernels of a layer with one expert a rank, 24 layers, every micro-step; products and slow links end in the meantime. The
    optimizer and the uneven experts come on top."""
    card = find_device("a100-80gb")
    slow = dataclasses.replace(card, link_gbs=1.0, everywhere=dataclasses.replace(card.everywhere, host_kernel=1.0, host_step=5.0))
    step = plan_time(job(accumulation_steps=accumulation_steps), slow)
    assert step.communication > 0.1 and step.host > 0
    assert step.total - step.optimizer - step.imbalance == pytest.approx(83 * 24 * accumulation_steps + 5)


def test_a_collective_takes_a_tenth_of_what_it_hides_behind() -> None:
    """It takes memory bandwidth and processors: nine tenths of its time are free, and of a longer one than the backward less."""
    one = Traffic(kind="k", link="l", bytes=1.0, messages=1, seconds=1.0, hidden_by="backward")
    assert exposed([one], 10.0) == pytest.approx(0.1)
    assert exposed([one], 0.5) == pytest.approx(1 - 0.9 * 0.5 + 0.1 * 0.5)
    assert exposed([dataclasses.replace(one, hidden_by="")], 10.0) == 1.0


def test_recomputing_everything_costs_a_third_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers; the head is not recomputed. performance.md: x 1.318 for 4b, with the head's share of 4.8 %."""
    device = ideal(monkeypatch)
    plain, again = (job("4b", ranks=1, ep_size=1, activation_checkpointing=mode) for mode in ("none", "full"))
    assert plan_time(again, device).total / plan_time(plain, device).total == pytest.approx(1.318, abs=0.002)


def test_bytes_of_the_expert_exchange() -> None:
    """By hand: 8 x 2,048 tokens x 2 experts x 1,536 x 2 bytes, of which 7 of 8 leave; 4 times, 24 layers, 4 micro-batches."""
    rows = next(t for t in traffic(job(), find_device("a100-80gb")) if t.kind == "expert rows")
    assert rows.bytes == pytest.approx(8 * 2048 * 2 * 1536 * 2 * 7 / 8 * 4 * 24 * 4)
    assert rows.messages == 4 * 24 * 4 and rows.link == "NVLink 3"
    assert not any(t.kind == "expert rows" for t in traffic(job(ep_size=1), find_device("h200")))


def test_zero_1_reduces_once_a_step_and_zero_2_every_micro_batch() -> None:
    once, every = (
        sum(t.bytes for t in traffic(job(zero_stage=stage), find_device("h200")) if "gradients" in t.kind) for stage in (1, 2)
    )
    assert every == pytest.approx(4 * once)
    # EP 8 on 8 ranks: nobody else holds the same experts, so only dense gradients are reduced: 206 M x 2 bytes x 2 x 7/8
    assert once == pytest.approx(job().dense_parameters * 2 * 2 * 7 / 8)


def test_expert_groups_stay_inside_a_node() -> None:
    assert groups(job(ranks=12))[0].nodes == 2  # the second half full
    everyone, same_experts, experts = groups(job(ranks=32))
    assert (everyone.size, everyone.nodes) == (32, 4)
    assert (same_experts.size, same_experts.nodes) == (4, 4)
    assert (experts.size, experts.nodes) == (8, 1)


@pytest.mark.parametrize(
    ("ranks", "in_node", "experts", "nodes"), [(12, 6, 4, 2), (12, 6, 2, 1), (24, 6, 8, 2), (16, 8, 16, 2), (6, 6, 2, 1)]
)
def test_an_expert_group_that_straddles_nodes_uses_the_network(ranks: int, in_node: int, experts: int, nodes: int) -> None:
    """Of two nodes of six the middle one of three groups of four lies on both."""
    planned = job(ranks=ranks, ranks_per_node=in_node, ep_size=experts)
    assert groups(planned)[2] == Group(size=experts, nodes=nodes)
    rows = next(t for t in traffic(planned, find_device("a100-80gb")) if t.kind == "expert rows")
    assert rows.link == ("network" if nodes > 1 else "NVLink 3")


def test_a_ring_over_the_network_uses_every_members_adapter() -> None:
    device = find_device("a100-80gb")
    assert ring_speed(device, Group(size=8, nodes=1)) == device.link_speed
    assert ring_speed(device, Group(size=16, nodes=2)) == pytest.approx(min(device.link_speed, 8 * device.network_speed))
    assert ring_speed(device, Group(size=4, nodes=4)) == pytest.approx(device.network_speed)


def test_gate_and_up_are_copied_where_that_pays_and_no_kernel_takes_them_apart() -> None:
    """By hand, eight experts of 2 x 512 x 1,536: the weights twice, their gradients once, read and written. Where that does not pay
    (`4b`, 8 x 8,192 columns for 32,768 rows) a sum of two input gradients, three rows of two experts each."""
    a100, h100 = find_device("a100-80gb"), find_device("h100-80gb")

    def more(model: str, **changes: int) -> float:
        planned = job(model, ranks=1, ep_size=1, **changes)
        return (sum(moved_by_layer(planned, h100)) - sum(moved_by_layer(planned, a100))) * planned.tokens

    assert more("800m") == 3 * 2 * (8 * 2 * 512 * 1536) * 2
    assert more("4b") == 3 * (2 * 8 * 2048 * 1536) * 2
    assert moved_by_layer(job(), a100) == moved_by_layer(job(), h100)  # one expert is a plain product
    for name, one_kernel in {"b200": True, "h200": True, "mi300x": True, "l40s": False, "rtx-5090": False}.items():
        assert moved_by_layer(job(ep_size=1), find_device(name)) == moved_by_layer(job(ep_size=1), h100 if one_kernel else a100)


def test_shares_add_up_and_more_work_takes_longer() -> None:
    device = find_device("a100-80gb")
    plain = plan_time(job(), device)
    assert sum(share for _, share in plain.limits) == pytest.approx(1.0)
    full, selective = (plan_time(job(activation_checkpointing=mode), device).total for mode in ("full", "selective"))
    assert full > selective > plain.total
    assert plan_time(job(accumulation_steps=8), device).total > 1.9 * plain.total
    assert plan_time(job(), find_device("h200")).total < plain.total
