"""Growth by counts: bytes, FLOPs and memory are linear in tokens, kernels do not become more, experts cost no more FLOPs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from nursery import Nursery

from launch.benchmarks.growth import with_experts
from model import MoEGPTConfig
from model.accounting import forward_flops_per_token

LENGTH = 64


@pytest.fixture(scope="module")
def measured(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Up to 512 tokens, which the loss takes in one chunk."""
    folder = tmp_path_factory.mktemp("growth")
    sizes = ["--model", "tiny", "--vocabulary", 512, "--sequence_length", LENGTH, "--tokens", 128, 256, 512, "--repeats", 1]
    ranks = nursery.start(1, "launch/benchmark.py", "growth", *sizes, "--output", folder / "g.json", log=folder / "log")
    assert ranks.wait(180) == [0], ranks.text()[-3000:]
    found: dict[str, Any] = json.loads((folder / "g.json").read_text())
    return {**found, "said": ranks.text()}


def totals(rows: dict[str, dict[str, float]], what: str) -> list[float]:
    return [row[what] * int(tokens) for tokens, row in rows.items()]


@pytest.mark.parametrize("what", ["kb_moved_per_token", "flops_per_token", "held_kb_per_token"])
def test_each_further_token_costs_the_same(measured: dict[str, Any], what: str) -> None:
    one, two, four = totals(measured["tokens"], what)
    assert (four - two) / 256 == pytest.approx((two - one) / 128, rel=0.01)
    assert four > 1.5 * two


def test_kernels_do_not_become_more_and_memory_grows_in_a_line(measured: dict[str, Any]) -> None:
    assert len({row["kernels"] for row in measured["tokens"].values()}) == 1
    slopes = [row["peak_kb_per_more_token"] for row in measured["tokens"].values() if "peak_kb_per_more_token" in row]
    # Which moment is the peak changes once: from 256 tokens to 384 and to 512 each further one adds the same 33.9 KB.
    assert len(slopes) == 2 and 0 < slopes[1] < 1.4 * slopes[0]


def test_more_experts_are_no_more_flops_nor_kernels(measured: dict[str, Any]) -> None:
    config = MoEGPTConfig.preset("tiny", num_hidden_layers=2, vocab_size=512)
    for experts, row in measured["experts"].items():
        formula = 3 * forward_flops_per_token(with_experts(config, int(experts)), LENGTH)
        assert row["flops_per_token"] == pytest.approx(formula, rel=0.01), experts
    flops = [row["flops_per_token"] for row in measured["experts"].values()]
    assert list(measured["experts"]) == ["1", "2", "4", "8"] and max(flops) / min(flops) < 1.02
    kernels = [row["kernels"] for name, row in measured["experts"].items() if name != "1"]
    assert max(kernels) == min(kernels)


def test_the_tables_show_what_the_result_holds(measured: dict[str, Any]) -> None:
    assert measured["said"].count("peak_kb_per_more_token") == 1
    for row in itertools.chain(measured["tokens"].values(), measured["experts"].values()):
        assert row["us_per_token"] > 0 and row["peak_mb"] > 0
        assert f"{row['us_per_token']:.4g}" in measured["said"]
