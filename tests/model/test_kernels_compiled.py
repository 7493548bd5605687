"""What `ptxas` makes of the Triton kernels, for sm80 and sm90, without a GPU: spills, registers, wide loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from tests.model.triton_worker import run_worker, triton_version

README = (ROOT / "model" / "README.md").read_text(encoding="utf-8")
WIDE = re.compile(r"v4\.b32|v2\.b64|cp\.async\.cg")  # the last has one size
#: Loads and stores of fewer than 16 bytes in a kernel's code: of what is no row. A token's places, weights, choices, sink, target,
#: the ends of experts' runs; sums over columns, whose stores are a small part of their loads; the router's weight, of whose tile a
#: thread has 8 bytes; a token's 8 logits; tables of positions, and k, of whose few heads a thread has 4 bytes, side by side over a
#: warp.
NARROW = {
    "sum over programs": 1, "sum over programs, q, k": 1, "sum over programs, sink": 17,
    "q, k": 10, "q, k, backward": 16, "sink": 7, "sink, gradient": 6,
    "product": 2, "product, backward": 2, "product, weight": 2,
    "gather": 2, "gather, with weights": 4, "gather, its sum": 2, "combine": 4, "combine, weights' gradient": 8,
    "swiglu, with products": 1, "router": 5, "lift": 3, "router, backward": 9, "router, weight": 1, "cross entropy": 4,
}  # fmt: skip


def triton_said() -> str:
    found = re.search(r"triton (\d+\.\d+\.\d+)", README)
    assert found
    return found[1]


def worker(folder: Path, *flags: str) -> dict[str, Any]:
    if (here := triton_version()) != triton_said():
        pytest.skip(f"model/README.md's figures are those of Triton {triton_said()}, not {here}")
    return run_worker("kernels_compiled_worker.py", *flags, TRITON_CACHE_DIR=str(folder))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker(tmp_path_factory.mktemp("triton"))


def said() -> dict[str, tuple[int, int]]:
    """The README's registers of each kernel, sm80 and sm90."""
    cells = re.findall(r"\| ([^|]+) \| (\d+) / (\d+) (?=\|)", README)
    return {name: (int(first), int(second)) for name, first, second in cells}


def narrow(steps: list[str]) -> int:
    return sum("global" in step and not WIDE.search(step) for step in steps)


def each(found: dict[str, Any], what: str) -> dict[tuple[str, str], Any]:
    return {(name, capability): one[what] for name, both in found["kernels"].items() for capability, one in both.items()}


def test_every_kernel_is_compiled_and_in_the_readme(found: dict[str, Any]) -> None:
    assert found["launched"] == found["all"]
    assert set(found["kernels"]) == set(said())


def test_nothing_is_spilled(found: dict[str, Any]) -> None:
    assert {key: spilled for key, spilled in each(found, "spilled").items() if spilled} == {}
    assert found["faults"]["too few registers"]["spilled"] > 0


def test_registers_are_no_more_than_the_readme_says(found: dict[str, Any]) -> None:
    registers = {name: (both["80"]["registers"], both["90"]["registers"]) for name, both in found["kernels"].items()}
    table = said()
    more = {name: pair for name, pair in registers.items() if pair[0] > table[name][0] or pair[1] > table[name][1]}
    assert more == {}


def test_rows_are_read_and_written_16_bytes_at_a_time(found: dict[str, Any]) -> None:
    steps = each(found, "steps")
    more = {key: count for key in steps if (count := narrow(steps[key])) > NARROW.get(key[0], 0)}
    assert more == {}
    without = {key for key in steps if not any(step.startswith(("ld", "cp")) and WIDE.search(step) for step in steps[key])}
    assert {name for name, _ in without} == {"sum over programs, sink", "lift"}  # whose rows are 24 heads, 8 logits
    assert narrow(found["faults"]["odd rows"]["steps"]) > 0


def test_the_loss_reads_a_logit_before_others_can_write_there(found: dict[str, Any]) -> None:
    """A barrier lies between: another thread puts the gradient in its place."""
    for capability in ("80", "90"):
        steps = found["kernels"]["cross entropy"][capability]["steps"]
        assert steps.count("ld.global.b16") == 1
        assert steps.index("ld.global.b16") < steps.index("bar.sync") < steps.index("st.global.v4.b32")


@pytest.mark.slow
def test_the_router_of_128_experts_spills_nothing(tmp_path: Path) -> None:
    """The most that `Router._fits_kernel` takes."""
    found = worker(tmp_path, "--many_experts")
    assert len(found["kernels"]) == 5
    assert not any(each(found, "spilled").values()) and max(each(found, "registers").values()) <= 128


@pytest.mark.slow
def test_no_tile_of_a_grouped_product_spills(tmp_path: Path) -> None:
    """Nor reads a row by fewer than 16 bytes, beside the runs' ends; widths that a tile does not divide included."""
    found = worker(tmp_path, "--tiles")
    assert len(found["kernels"]) == 33
    assert {key: spilled for key, spilled in each(found, "spilled").items() if spilled} == {}
    assert max(narrow(steps) for steps in each(found, "steps").values()) <= 2
