"""The grouped products' kernels: numerics under Triton's interpreter in float64's company, cost, and who takes them when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from launch.benchmarks.op_count.counter import Count
from launch.benchmarks.op_count.cuda_kernels import as_on_cuda
from launch.engine.expert_parallel import Experts
from model import grouped
from model.dispatch import grouped_linears
from tests.model.triton_worker import run_interpreted, run_worker

R, E, H, I = 64, 4, 32, 48  # noqa: E741


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_interpreted("grouped_worker.py")


def too_far(errors: dict[str, float]) -> dict[str, float]:
    """bf16 may be off by a rounding of its results."""
    assert len(errors) > 14
    return {name: value for name, value in errors.items() if not value < (5e-3 if name.startswith("bfloat16") else 2e-6)}


def test_products_and_gradients_are_each_experts_own(interpreted: dict[str, Any]) -> None:
    """Several tiles and bands in every direction, ragged runs, experts without rows, all rows to one, no rows; one graph."""
    assert too_far(interpreted["errors"]) == {}


def test_no_loop_can_stop_early(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["loops"]) == 3
    assert all(error > 0.1 for error in interpreted["loops"].values()), interpreted["loops"]


def test_a_tile_is_chosen_by_an_experts_rows(interpreted: dict[str, Any]) -> None:
    of_rows = {"1": [16, 128], "30": [32, 128], "50": [64, 128], "384": [64, 128], "512": [128, 128], "4096": [128, 256]}
    assert interpreted["chosen"] == {**of_rows, "384, none ragged": [128, 256], "512, float32": [64, 64]}
    # Of 2 experts with 48 rows of 80 columns each, and two weights 48 high.
    assert interpreted["asked"] == [[2, 48, 96, True], [2, 48, 80, True], [4, 48, 80, False]]


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert too_far(run_worker("grouped_worker.py", "--gpu")["errors"]) == {}


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


@pytest.fixture
def before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.operators.fits", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr("model.grouped.lacks_grouped_mm", lambda device: True)


def test_a_layers_experts_cost_what_their_shapes_say(before_hopper: None) -> None:
    """Six products' FLOPs, each operand read once, one kernel each; no weight is copied, none but the three is kept."""
    with torch.device("meta"):
        experts = Experts(H, I, E, use_grouped_mm=True).bfloat16()
    experts.use_triton_grouped_mm = True  # as DeepSpeed says on an A100: ours come first
    with Count() as count:
        out = experts(tensor(R, H), tensor(E, dtype=torch.int64))
        count.end_forward()
        out.backward(torch.empty_like(out))
    products = [e for e in count.counts.entries if e.kind == "matrix product"]
    names = ["grouped_product"] * 2 + ["grouped_product_backward", "grouped_weight_gradient"] * 2
    assert [e.name for e in products] == names and all(e.launches == 1 for e in products)
    assert sum(e.flops for e in products) == 3 * 2 * R * 3 * H * I
    wide, narrow, ends = E * 2 * I * H, E * H * I, 4 * E
    up, down = 2 * (R * H + wide + R * 2 * I) + ends, 2 * (R * I + narrow + R * H) + ends
    assert [e.bytes for e in products] == [up, down, down, down, up, up]
    assert not any(e.name == "cat" for e in count.counts.entries)
    # rows, gate and up, their product, ends
    assert count.counts.held == 2 * (R * H + R * 2 * I + R * I + R * H) + ends


@pytest.mark.parametrize(
    ("shapes", "dtype", "takes"),
    [
        ([(E, I, H)], torch.bfloat16, True),
        ([(E, I, H), (E, I, H)], torch.float32, True),
        ([(1, I, H)], torch.bfloat16, False),  # a plain product
        ([(E, I, H), (E, 2 * I, H)], torch.bfloat16, False),
        ([(E, I, H)] * 3, torch.bfloat16, False),
        ([(E, I + 8, H)], torch.bfloat16, False),
        ([(E, I, H)], torch.float64, False),
    ],
)
def test_which_products_the_kernel_takes(before_hopper: None, shapes: list[Any], dtype: torch.dtype, takes: bool) -> None:
    assert grouped.has_kernel(tensor(R, H, dtype=dtype), [tensor(*shape, dtype=dtype) for shape in shapes]) is takes


def test_rows_and_weights_of_two_dtypes_are_not_for_the_kernel(before_hopper: None) -> None:
    assert not grouped.has_kernel(tensor(R, H), [tensor(E, I, H, dtype=torch.float32)])


def test_hopper_and_the_switch_keep_their_ways(before_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = tensor(R, H), [tensor(E, I, H)]
    assert grouped.has_kernel(x, weights)
    with monkeypatch.context() as without:  # as MOE_KERNELS=0 makes it
        without.setattr("model.operators.fits", lambda x: False)
        assert not grouped.has_kernel(x, weights)
    monkeypatch.setattr("model.grouped.lacks_grouped_mm", lambda device: False)
    assert not grouped.has_kernel(x, weights)


@pytest.mark.parametrize(("major", "lacks"), [(8, True), (9, False), (10, False), (11, True), (12, True)])
def test_a_gpu_is_asked_for_its_generation(major: int, lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"major": major}))
    assert grouped.lacks_grouped_mm(torch.device("cuda", 0)) is lacks
    assert not grouped.lacks_grouped_mm(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's numbers mean other GPUs
    assert not grouped.lacks_grouped_mm(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "counted_here"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), True), (None, False)]
)
def test_the_roofline_counts_it_where_it_runs(capability: tuple[int, int] | None, counted_here: bool) -> None:
    with as_on_cuda(R, capability), Count() as count:
        grouped_linears(tensor(R, H), tensor(E, dtype=torch.int32), tensor(E, I, H))
    assert [e.name for e in count.counts.entries] == ["grouped_product" if counted_here else "_grouped_mm"]
