"""The roofline: its FLOPs are those of the formula, ours moves less than its peers, the command writes what scripts read."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.moe.ep_experts import GroupedExperts
from planner_job import job
from support import ROOT

from data.cli import UserError
from launch.benchmarks import roofline as command
from launch.benchmarks.contestants import gpu_knobs
from launch.benchmarks.op_count.counter import Entry
from launch.benchmarks.roofline import LIMITS, job_of, operation_seconds
from launch.planning.activations import kept_activations
from launch.planning.devices import find_device
from launch.planning.time import kernels_by_layer, moved_again, moved_by_layer, plan_time
from model import MoEGPTConfig
from model.accounting import forward_flops_per_token

PEERS = ("stock AutoEP", "stock AutoEP with knobs", "transformers Glm4Moe")


@pytest.fixture(scope="module", params=[(1, "h100-80gb"), (8, "h100-80gb"), (1, "a100-80gb")], ids=str)
def roofline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (ep, gpu), folder = request.param, tmp_path_factory.mktemp("roofline")
    command = [sys.executable, "launch/benchmark.py", "roofline", "--model", "800m", "--gpu", gpu, "--ep", str(ep)]
    command += ["--output", str(folder / "r.json"), "--chart", str(folder / "r.svg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not measured" in done.stdout
    assert ET.parse(folder / "r.svg").getroot().tag.endswith("svg")
    result: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return {**result, "ep": ep, "gpu": gpu}


def test_flops_are_the_formulas(roofline: dict[str, Any]) -> None:
    config = MoEGPTConfig.preset("800m")
    layer = (forward_flops_per_token(config, 2048) - 2 * config.vocab_size * config.hidden_size) / config.num_hidden_layers
    for name in ("ours", "ours, selective", *PEERS):
        # alignment to 8 rows for each expert is what AutoEP multiplies beyond it
        assert roofline[name]["flops_per_token_layer"] == pytest.approx(3 * layer, rel=0.005), name


def test_ours_moves_less(roofline: dict[str, Any]) -> None:
    ours = roofline["ours"]
    for name in PEERS:
        peer = roofline[name]
        assert ours["bytes_per_token_layer"] < 0.75 * peer["bytes_per_token_layer"], name
        assert ours["launches_per_layer"] < 0.75 * peer["launches_per_layer"], name
        assert ours["saved_bytes_per_token_layer"] < peer["saved_bytes_per_token_layer"], name
        assert ours["mfu"] > peer["mfu"], name
    assert ours["host_waits_per_layer"] == (1 if roofline["ep"] > 1 else 0)


def test_the_planner_says_what_is_counted(roofline: dict[str, Any]) -> None:
    """Bytes, kernels, and the time of a step; where one operation's FLOPs hide its bytes the planner adds the two.

    Beside what the planner moves the count has the four all-to-alls of a layer, each of which reads and writes its rows: they take
    the link's time.
    """
    ep, ours, device = roofline["ep"], roofline["ours"], find_device(roofline["gpu"])
    planned = job(ranks=ep, ep_size=ep, accumulation_steps=8)
    rows = planned.sizes.num_experts_per_tok * planned.sizes.hidden_size * planned.weight_bytes
    moved = sum(moved_by_layer(planned, device)) + (8 * rows if ep > 1 else 0)
    assert moved == pytest.approx(ours["bytes_per_token_layer_beside_products"], rel=0.01)
    for mode, name in (("none", "ours"), ("selective", "ours, selective"), ("full", "ours, full")):
        again = dataclasses.replace(planned, activation_checkpointing=mode)
        assert kernels_by_layer(again, device) == pytest.approx(roofline[name]["launches_per_layer"], abs=2), mode
        whole = roofline[name]["whole_step"]["mfu"]
        assert plan_time(again, device).mfu(again, device) == pytest.approx(whole, rel=0.04)


def test_the_planner_keeps_what_is_counted(roofline: dict[str, Any]) -> None:
    """With kernels: of a layer, beside the layers, and while the loss is computed."""
    planned, ours = job(ranks=roofline["ep"], ep_size=roofline["ep"]), roofline["ours"]
    kept, last_norm = kept_activations(planned), planned.tokens * planned.sizes.hidden_size * planned.weight_bytes
    a_layer = (kept.held - last_norm) / planned.tokens / planned.sizes.num_hidden_layers
    assert a_layer == pytest.approx(ours["saved_bytes_per_token_layer"], rel=0.005)
    assert last_norm + kept.loss_kept == pytest.approx(ours["saved_bytes_beside_layers"], rel=0.005)
    assert kept.loss - kept.loss_kept == pytest.approx(ours["loss_bytes_at_most"], rel=0.005)


def test_selective_repeats_passes_and_no_exchange(roofline: dict[str, Any]) -> None:
    """Its bytes and what it keeps are the planner's; a kernel for each of six passes, of five where rows come by exchange."""
    plain, less = roofline["ours"], roofline["ours, selective"]
    planned = job(ranks=roofline["ep"], ep_size=roofline["ep"], activation_checkpointing="selective")
    more = less["bytes_per_token_layer"] - plain["bytes_per_token_layer"]
    assert more == pytest.approx(moved_again(planned), rel=0.01)
    assert less["launches_per_layer"] - plain["launches_per_layer"] == (5 if roofline["ep"] > 1 else 6)
    assert less["all_to_all_bytes_per_token_layer"] == plain["all_to_all_bytes_per_token_layer"]
    kept, last_norm = kept_activations(planned), planned.tokens * planned.sizes.hidden_size * planned.weight_bytes
    a_layer = (kept.held - last_norm) / planned.tokens / planned.sizes.num_hidden_layers
    assert a_layer == pytest.approx(less["saved_bytes_per_token_layer"], rel=0.005)
    # the goal is 24 KiB; rows that arrived from other ranks are 6 of 26
    assert less["saved_bytes_per_token_layer"] < (26.5 if roofline["ep"] > 1 else 20.5) * 1024
    assert less["mfu"] > 0.95 * plain["mfu"]


def test_full_repeats_the_forward(roofline: dict[str, Any]) -> None:
    """A third more of FLOPs and, with exchange, half of the all-to-alls and a host wait more; each block keeps its input alone."""
    plain, full = roofline["ours"], roofline["ours, full"]
    assert full["flops_per_token_layer"] == pytest.approx(4 / 3 * plain["flops_per_token_layer"], rel=0.005)
    assert full["all_to_all_bytes_per_token_layer"] == pytest.approx(1.5 * plain["all_to_all_bytes_per_token_layer"], rel=1e-3)
    assert full["host_waits_per_layer"] == 2 * plain["host_waits_per_layer"]
    assert full["saved_bytes_per_token_layer"] == pytest.approx(2 * MoEGPTConfig.preset("800m").hidden_size, rel=0.02)


def test_knobs_help_the_peer(roofline: dict[str, Any]) -> None:
    """Gate and up in one product, rows weighed and summed in one kernel a direction, the wait later: fewer bytes and kernels."""
    plain, knobs = roofline["stock AutoEP"], roofline["stock AutoEP with knobs"]
    assert knobs["launches_per_layer"] < plain["launches_per_layer"] - 8
    assert knobs["bytes_per_token_layer"] < 0.95 * plain["bytes_per_token_layer"] and knobs["mfu"] > plain["mfu"]
    assert knobs["host_waits_per_layer"] == plain["host_waits_per_layer"]


@pytest.mark.parametrize(("capability", "has_triton_product"), [((8, 0), True), ((9, 0), False), ((12, 0), False)])
def test_knobs_are_what_deepspeed_takes(
    capability: tuple[int, int], has_triton_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = gpu_knobs(capability)
    parse_autoep_config({"enabled": True, "autoep_size": 8, "preset_model": "deepseek_v3", **chosen})
    monkeypatch.setattr(type(get_accelerator()), "prefer_triton_grouped_mm", lambda _: has_triton_product)
    for way in ("separate", "fused"):
        accepted = True
        try:
            GroupedExperts(8, 8, 2, use_grouped_mm=chosen["use_grouped_mm"], gate_up_impl=way)
        except ValueError:
            accepted = False
        assert accepted or way != chosen.get("gate_up_impl", "separate")
    assert accepted == (chosen.get("gate_up_impl") == "fused")  # it is taken where it can be


def job_by(*flags: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return job_of(parser.parse_args(flags), MoEGPTConfig.preset("800m"))


def test_what_is_counted_is_the_jsons(tmp_path: Path) -> None:
    path = tmp_path / "j.json"
    settings = json.loads((ROOT / "ds_configs" / "ep8_zero2.json").read_text())
    path.write_text(json.dumps({**settings, "activation_checkpointing": {"mode": "full"}}))
    layout = attrgetter("activation_checkpointing", "ep_size", "ranks", "micro_batch_size", "accumulation_steps")
    counted = job_by("--deepspeed_config", str(path), "--num_gpus", "16")
    assert layout(counted) == ("full", 8, 16, 8, 2)
    changed = job_by("--deepspeed_config", str(path), "--activation_checkpointing", "none", "--ep", "4", "--accumulation", "3")
    assert layout(changed) == ("none", 4, 4, 8, 3)
    assert layout(job_by()) == ("none", 1, 1, 8, 8)
    wider = job_by("--deepspeed_config", str(path), "--micro_batch", "16")  # 256 samples a step of 8 ranks, accumulation "auto"
    assert layout(wider)[3:] == (16, 2)
    auto = ("--deepspeed_config", str(ROOT / "ds_configs" / "cpu_ep2_zero2.json"))  # 16 samples, micro-batch "auto", accumulation 1
    narrow, deep = job_by(*auto, "--micro_batch", "4"), job_by(*auto, "--accumulation", "4")
    assert layout(narrow)[3:] == (4, 1) and layout(deep)[3:] == (2, 4)
    with pytest.raises(UserError, match="--num_gpus 3 is no multiple of the 2 ranks"):
        job_by("--ep", "2", "--num_gpus", "3")
    for flag, value in itertools.product(("ep", "num_gpus", "sequence_length", "micro_batch", "accumulation"), ("-2", "0")):
        with pytest.raises(UserError, match=f"--{flag} must be at least 1, not {value}"):
            job_by(f"--{flag}", value)


def test_parts_families_and_limits_add_up(roofline: dict[str, Any]) -> None:
    for name in ("ours", "ours, full", *PEERS):
        row = roofline[name]
        assert sum(row["limits"].values()) == pytest.approx(row["seconds"]) and set(row["limits"]) <= set(LIMITS)
        for family in row["families"].values():
            assert sum(family["limits"].values()) == pytest.approx(family["seconds"])
            assert family["limits"][family["limited_by"]] == max(family["limits"].values())
        whole = row["whole_step"]
        more = sum(whole[what] for what in ("collectives", "uneven experts", "host"))
        assert whole["seconds"] == pytest.approx(row["seconds"] + more)
        assert whole["mfu"] * whole["seconds"] == pytest.approx(row["mfu"] * row["seconds"])
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert sum(family["seconds"] for family in row["families"].values()) == pytest.approx(row["seconds"])
        kilobytes = sum(family["bytes_per_token_layer"] for family in row["families"].values())
        assert kilobytes == pytest.approx(row["bytes_per_token_layer"])


def test_rows_travel_twice_each_way(roofline: dict[str, Any]) -> None:
    """To the experts and back, in forward and in backward: K rows of H in bf16, of which an even share stays; and the counts."""
    config = MoEGPTConfig.preset("800m")
    rows = 4 * config.num_experts_per_tok * config.hidden_size * 2
    wanted = rows * (roofline["ep"] - 1) / roofline["ep"]
    assert roofline["ours"]["all_to_all_bytes_per_token_layer"] == pytest.approx(wanted, rel=1e-3)


def test_what_limits_a_family(roofline: dict[str, Any]) -> None:
    """Products and attention their FLOPs, passes their bytes, and on a whole node the exchange its link."""
    families = roofline["ours"]["families"]
    wanted = {"matrix product": "FLOPs", "attention": "FLOPs", "norm": "bytes", "gather and scatter": "bytes"}
    wanted |= {"all-to-all": "link"} if roofline["ep"] > 1 else {}
    assert {kind: families[kind]["limited_by"] for kind in wanted} == wanted


def test_an_operation_takes_what_limits_it() -> None:
    device = find_device("h100-80gb")
    base = {"part": "x", "kind": "elementwise and sums", "name": "x", "backward": False}
    assert operation_seconds(Entry(**base, launches=2), device) == ("launches", 2 * device.everywhere.shortest_kernel)
    assert operation_seconds(Entry(**base, bytes=10**10), device) == ("bytes", 10**10 / device.memory_speed)
    product = Entry(**{**base, "kind": "matrix product"}, flops=1e15, shape=(4096, 4096, 4096, 1))
    assert operation_seconds(product, device) == ("FLOPs", pytest.approx(1e15 / (989e12 * device.efficiency.matrix)))
    grouped = Entry(**{**base, "kind": "matrix product"}, flops=1e15, shape=(4096, 4096, 512, 8))
    rate = device.efficiency.narrow * device.efficiency.grouped
    assert operation_seconds(grouped, device) == ("FLOPs", pytest.approx(1e15 / (989e12 * rate)))
    assert operation_seconds(Entry(**base, sent=10**10), device) == ("link", 10**10 / device.link_speed)
