"""From a trace of torch.profiler to the seconds that each part of a step takes, which add up to the step.

Every instant of the steps belongs to one part. On a CPU: to the innermost named event of the thread that trains, or, where that
thread waits while a collective is under way, to communication. On a GPU: to the kernel that runs, by the event that launched
it (of several at once, arithmetic before communication), else to data where the host waits for them, else to idle.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from launch.engine.exchange import Arrival, Departure
from launch.profiling.parts import PARTS
from launch.profiling.ranges import PREFIX, STEP
from model.dispatch import Combine

HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
#: Autograd functions that are a part by themselves, whatever module they are called in.
FUNCTIONS = {Combine.__name__: "combine", Departure.__name__: "communication", Arrival.__name__: "communication"}
NODE = "autograd::engine::evaluate_function: "

Event = dict[str, Any]
Interval = tuple[float, float, str]  # begin and end in microseconds, part
#: What one host thread did: consecutive intervals, each with its innermost event's part, and whether that event computes.
Thread = list[tuple[Interval, bool]]


def seconds_by_part(events: Iterable[Event]) -> dict[str, float]:
    """Seconds of each of `PARTS` over all steps of the trace. Raises ValueError for a trace without a step."""
    events = [e for e in events if e.get("ph") == "X"]
    host = sorted((e for e in events if e["cat"] in HOST), key=lambda e: (e["ts"], -e["dur"]))
    steps = [e for e in host if e["name"] == STEP]
    if not steps:
        raise ValueError("no step in the trace")
    main = steps[0]["tid"]
    parts = Parts(host)
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in host:
        by_thread[event["tid"]].append(event)
    order = sorted(by_thread, key=lambda thread: thread != main)  # first: others run the backward of what it did
    threads = {thread: read_thread(by_thread[thread], parts) for thread in order}
    kernels = [e for e in events if e["cat"] in DEVICE]
    if kernels:
        found = on_device(steps, kernels, parts, threads[main])
    else:
        found = on_host(steps, threads[main], [e for e in events if is_collective(e["name"]) and e["tid"] != main])
    totals = dict.fromkeys(PARTS, 0.0)
    for begin, end, part in found:
        totals[part] += (end - begin) * 1e-6
    return totals


class Parts:
    """What event belongs to which part, told in the order of time; `None` where its surroundings say it."""

    def __init__(self, host: Sequence[Event]) -> None:
        self._forward: dict[tuple[Any, int], str] = {}  # thread, sequence number
        self._thread_of = _threads_of_forwards(host)
        self.launched: dict[int, str] = {}

    def of(self, event: Event, around: str) -> str:
        """Of a host event inside of one of part `around`; remembers what later events refer to."""
        args = event.get("args", {})
        part = self._own(event["name"], args) or around
        if (number := _sequence(args)) is not None and not args.get("Fwd thread id"):
            self._forward[event["tid"], number] = part  # the last to have the number is the one that made the node
        if "correlation" in args:
            self.launched[args["correlation"]] = part
        return part

    def _own(self, name: str, args: dict[str, Any]) -> str | None:
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
        if is_collective(name):
            return "communication"
        if (function := name.removeprefix(NODE).removesuffix("Backward")) in FUNCTIONS:
            return FUNCTIONS[function]
        if name.startswith("Torch-Compiled Region"):
            return "compiled block"
        if "AccumulateGrad" in name:
            return "gradients"
        forward_thread = args.get("Fwd thread id")
        if name.startswith(NODE) and forward_thread:
            return self._forward.get((self._thread_of.get(forward_thread), _sequence(args) or 0))
        return None


def _sequence(args: dict[str, Any]) -> int | None:
    number = args.get("Sequence number")
    return int(number) if number is not None and int(number) >= 0 else None


def _threads_of_forwards(host: Sequence[Event]) -> dict[int, Any]:
    """The profiler's number of the thread that a node's forward ran on -> the trace's, which no event says.

    By where the nodes' sequence numbers occur; each thread counts for itself, so the one that trained, whose number is lower
    than those of threads that came later, chooses first.
    """
    made_on: dict[int, set[Any]] = defaultdict(set)
    votes: dict[int, Counter[Any]] = defaultdict(Counter)
    for event in host:
        args = event.get("args", {})
        if (number := _sequence(args)) is None:
            continue
        if forward_thread := args.get("Fwd thread id"):
            votes[forward_thread].update(made_on[number])
        else:
            made_on[number].add(event["tid"])
    chosen: dict[int, Any] = {}
    for number in sorted(votes):
        free = [thread for thread, _ in votes[number].most_common() if thread not in chosen.values()]
        if free:
            chosen[number] = free[0]
    return chosen


def is_collective(name: str) -> bool:
    return name.lower().startswith(("gloo:", "nccl", "c10d::"))


def read_thread(events: Sequence[Event], parts: Parts) -> Thread:
    """The innermost event of every instant; `events` by their begin, the outer of two that begin together first."""
    thread, stack = Thread(), list[tuple[float, str, bool]]()  # end, part, computes
    now = 0.0

    def advance(until: float) -> None:
        nonlocal now
        while stack and now < until:
            end, part, computes = stack[-1]
            if min(end, until) > now:
                thread.append(((now, min(end, until), part), computes))
            now = max(now, min(end, until))
            if end <= until:
                stack.pop()
        now = max(now, until)

    for event in events:
        begin, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        advance(begin)
        while stack and stack[-1][0] <= begin:
            stack.pop()
        around = stack[-1][1] if stack else "other"
        if stack:
            end = min(end, stack[-1][0])
        stack.append((end, parts.of(event, around), event["name"].startswith("aten::")))
    advance(float("inf"))
    return thread


def on_host(steps: Sequence[Event], main: Thread, collectives: Sequence[Event]) -> Iterator[Interval]:
    """The steps' time on the thread that trains; where it computes nothing and a collective is under way, it waits for that."""
    under_way = union((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in collectives)
    for step in steps:
        window = float(step["ts"]), float(step["ts"]) + float(step["dur"])
        for (begin, end, part), computes in main:
            begin, end = max(begin, window[0]), min(end, window[1])
            if begin >= end:
                continue
            waits = [] if computes else list(overlap(begin, end, under_way))
            for from_, to in waits:
                yield from_, to, "communication"
            yield begin, end - sum(to - from_ for from_, to in waits), part


def on_device(steps: Sequence[Event], kernels: Sequence[Event], parts: Parts, main: Thread) -> Iterator[Interval]:
    """From the first step's begin to the last one's end, by what the device runs."""
    gaps = [(float(steps[0]["ts"]), float(steps[-1]["ts"]) + float(steps[-1]["dur"]))]
    running: list[list[Interval]] = [[], [], [interval for interval, _ in main if interval[2] == "data"]]
    for kernel in kernels:
        begin, sends = float(kernel["ts"]), is_collective(kernel["name"])
        launched = parts.launched.get(kernel.get("args", {}).get("correlation", -1), "other")
        running[sends].append((begin, begin + float(kernel["dur"]), "communication" if sends else launched))
    for layer in running:  # what is first takes its time, the next what is left
        taken, gaps = fill(gaps, layer)
        yield from taken
    for begin, end in gaps:
        yield begin, end, "idle"


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint and in order."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def overlap(begin: float, end: float, disjoint: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The pieces of `disjoint`, which are in order, inside of an interval."""
    place = max(0, bisect.bisect_right(disjoint, (begin, float("inf"))) - 1)
    for other_begin, other_end in disjoint[place:]:
        if other_begin >= end:
            return
        if other_end > begin:
            yield max(begin, other_begin), min(end, other_end)


def fill(gaps: Sequence[tuple[float, float]], layer: Iterable[Interval]) -> tuple[list[Interval], list[tuple[float, float]]]:
    """Which part of the gaps (disjoint, in order) the intervals take, the earlier first, and what is left of the gaps."""
    taken, now = list[Interval](), float("-inf")
    for begin, end, part in sorted(layer):
        taken += [(a, b, part) for a, b in overlap(max(begin, now), end, gaps)] if end > max(begin, now) else []
        now = max(now, end)
    covered = union((begin, end) for begin, end, _ in taken)
    left = []
    for begin, end in gaps:
        for from_, to in overlap(begin, end, covered):
            if from_ > begin:
                left.append((begin, from_))
            begin = to
        if end > begin:
            left.append((begin, end))
    return taken, left
