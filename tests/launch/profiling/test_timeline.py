"""From made-up traces, whose answer can be worked out by hand, to the seconds of each part."""

from __future__ import annotations

from typing import Any

import pytest

from launch.profiling.ranges import PREFIX, STEP
from launch.profiling.timeline import fill, overlap, seconds_by_part, union

MAIN, OTHER, STREAM, LINK = 1, 2, 7, 8
MICRO = 1e-6


def event(name: str, begin: float, end: float, *, tid: int = MAIN, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


def node(name: str, begin: float, end: float, number: int, **more: Any) -> dict[str, Any]:
    more.setdefault("tid", MAIN)
    more["Fwd thread id"] = more.pop("forward_thread", 1)
    return event(f"autograd::engine::evaluate_function: {name}", begin, end, **{"Sequence number": number}, **more)


def forward(name: str, begin: float, end: float, number: int, **more: Any) -> dict[str, Any]:
    return event(name, begin, end, **{"Sequence number": number, "Fwd thread id": 0}, **more)


def parts(events: list[dict[str, Any]]) -> dict[str, float]:
    """In microseconds, without what is zero."""
    return {part: round(seconds / MICRO, 6) for part, seconds in seconds_by_part(events).items() if seconds}


HOST_STEP = [
    event(STEP, 0, 1000),
    event(PREFIX + "attention", 100, 300),
    forward("aten::t", 110, 120, 4),  # has the number of the node that comes after it
    forward("aten::mm", 150, 250, 4),
    event(PREFIX + "experts", 300, 400),
    forward("aten::mm", 310, 390, 5),
    event(PREFIX + "gradients", 500, 900),
    node("MmBackward0", 510, 600, 5),
    node("MmBackward0", 600, 640, 4),
    event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 640, 700),
]


def test_an_instant_belongs_to_the_innermost_name_and_a_backward_to_its_forward() -> None:
    expected = {"attention": 200 + 40, "experts": 100 + 90, "gradients": 400 - 130, "other": 100 + 100 + 100}
    assert parts(HOST_STEP) == expected
    assert sum(expected.values()) == 1000


def test_waiting_is_communication_and_computing_meanwhile_is_not() -> None:
    flight = event("gloo:all_to_all", 120, 480, tid=OTHER, cat="user_annotation")
    found = parts([*HOST_STEP, flight])
    # 120 to 150 and 250 to 300 in attention, 300 to 310 and 390 to 400 in experts, 400 to 480 outside of both
    assert found["communication"] == 30 + 50 + 10 + 10 + 80
    assert found["attention"] == 240 - 80 and found["experts"] == 190 - 20 and sum(found.values()) == 1000


def test_a_function_is_its_own_part_in_both_directions() -> None:
    events = [
        event(STEP, 0, 100),
        event(PREFIX + "dispatch", 0, 50),
        forward("Combine", 10, 30, 9),
        event("aten::sum", 12, 20),
        node("CombineBackward", 60, 80, 9),
    ]
    assert parts(events) == {"dispatch": 30, "combine": 40, "other": 30}


def test_a_recomputation_on_another_thread_is_not_taken_for_the_forward() -> None:
    """Both threads number their nodes from 0; only the thread of the forward tells them apart."""
    events = [
        event(STEP, 0, 100),
        event(PREFIX + "norms", 0, 10),
        forward("aten::rms_norm", 1, 9, 3),
        event(PREFIX + "loss", 10, 20),
        forward("aten::sum", 11, 19, 4),
        event("autograd::engine::evaluate_function: Checkpoint", 20, 60, tid=OTHER),
        event(PREFIX + "attention", 25, 50, tid=OTHER),
        forward("aten::mm", 26, 40, 4, tid=OTHER),
        event("aten::cos", 52, 58, tid=OTHER),
        node("MmBackward0", 50, 60, 4, tid=OTHER, forward_thread=2),
        node("RmsBackward", 62, 70, 3, tid=OTHER),
        event("cudaLaunchKernel", 53, 54, tid=OTHER, cat="cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 64, 65, tid=OTHER, cat="cuda_runtime", correlation=2),
        event("dgrad", 60, 75, tid=STREAM, cat="kernel", correlation=1),
        event("norm", 75, 80, tid=STREAM, cat="kernel", correlation=2),
    ]
    assert parts(events) == {"attention": 15, "norms": 5, "idle": 80}


def test_on_a_gpu_kernels_count_and_arithmetic_hides_communication() -> None:
    events = [
        event(STEP, 0, 100),
        event(PREFIX + "data", 0, 10),
        event(PREFIX + "attention", 10, 14),
        event("aten::mm", 10, 13),
        event("cudaLaunchKernel", 11, 12, cat="cuda_runtime", correlation=1),
        event("c10d::alltoall_base_", 15, 18),
        event("cudaLaunchKernel", 16, 17, cat="cuda_runtime", correlation=2),
        event("gemm", 20, 60, tid=STREAM, cat="kernel", correlation=1),
        event("ncclDevKernel_SendRecv", 30, 90, tid=LINK, cat="kernel", correlation=2),
        event("a kernel of nobody", 95, 97, tid=STREAM, cat="kernel", correlation=3),
    ]
    assert parts(events) == {"data": 10, "attention": 40, "communication": 30, "other": 2, "idle": 10 + 5 + 3}


def test_a_trace_without_a_step() -> None:
    with pytest.raises(ValueError, match="no step"):
        seconds_by_part([event("aten::mm", 0, 1)])


def test_intervals() -> None:
    assert union([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert list(overlap(1, 10, [(0, 2), (3, 4), (9, 12)])) == [(1, 2), (3, 4), (9, 10)]
    taken, left = fill([(0, 10), (20, 30)], [(5, 25, "a"), (8, 28, "b")])
    assert taken == [(5, 10, "a"), (20, 25, "a"), (25, 28, "b")] and left == [(0, 5), (28, 30)]
