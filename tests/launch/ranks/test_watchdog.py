"""The watchdog's parts in one process: its clock, its last words, and the end that must come whatever hangs (the whole of it is in
tests/faults)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import ROOT, fill_pipe

from launch.ranks import watchdog
from launch.ranks.heartbeat import Hang, Heartbeat
from launch.ranks.watchdog import AwakeClock, Watchdog, stacks

END = """
import os, sys, time
from launch.ranks import watchdog
from launch.ranks.heartbeat import Hang
watchdog.LAST_RESORT_SECONDS = 1.0
dog = watchdog.Watchdog(stall=5)
{prepare}
dog._end(Hang(cause="nothing moves", suspect=0))
"""


def end(prepare: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", END.format(prepare=prepare)], cwd=ROOT, **options)  # type: ignore[call-overload]


def test_a_store_that_is_stuck_does_not_keep_a_rank_alive() -> None:
    process = end('dog._store = type("Stuck", (), {"claim_host": lambda *_: time.sleep(60)})()', stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 17
    assert b"error: nothing moves. This is rank 0 at step 0" in said and b"Thread 0x" in said


def test_a_standard_error_that_is_stuck_does_not_keep_a_rank_alive() -> None:
    """A terminal on hold: nobody reads the pipe, and it is full."""
    reader, writer = os.pipe()
    fill_pipe(writer)
    process = end("", stderr=writer)
    assert process.wait(60) == 17
    os.close(reader)
    os.close(writer)


def test_an_interpreter_that_is_stuck_does_not_keep_a_rank_alive() -> None:
    """A library holds the interpreter's lock for ever: no thread of ours runs again, the kernel's alarm does."""
    hold = "import ctypes; ctypes.PyDLL(None).sleep(600)"
    process = end(f'dog._store = type("Stuck", (), {{"claim_host": lambda *_: exec("{hold}")}})()', stderr=subprocess.DEVNULL)
    assert process.wait(60) == -signal.SIGALRM


def test_a_run_is_ended_where_no_rank_has_moved_and_not_where_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save, or an evaluation, keeps the others waiting for longer than `--stall_timeout` on end."""
    dog, ended = Watchdog(stall=5), list[Hang]()
    monkeypatch.setattr(dog, "_end", ended.append)
    dog._step, dog._phase, dog._since = 3, "forward", dog._clock() - 100
    for seconds in (0.0, 100.0):
        assert not ended
        dog._heard = {1: (Heartbeat(step=3, phase="loading data", host="h", seconds=seconds, moves=1), dog._clock())}
        dog._look_for_a_hang()
    assert [hang.suspect for hang in ended] == [0], "the one that is behind"


def test_of_many_ranks_that_stand_still_those_furthest_behind_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, ended = Watchdog(stall=5), list[Hang]()
    monkeypatch.setattr(dog, "_end", ended.append)
    dog.rank, dog._step, dog._since = 0, 4, dog._clock() - 100
    places = {rank: Heartbeat(step=3 if rank == 500 else 4, phase="forward", host="h", seconds=100.0) for rank in range(1, 512)}
    dog._heard = {rank: (place, dog._clock()) for rank, place in places.items()}
    dog._look_for_a_hang()
    said = ended[0].cause
    assert said.startswith("no rank has moved for 5 s: rank 500 at step 3, forward (host h); rank 0 at step 4, ")
    assert said.count("rank ") == 1 + 8 and said.endswith("; and 504 more")


def test_what_all_ranks_of_a_host_have_heard_one_of_them_says(monkeypatch: pytest.MonkeyPatch) -> None:
    claims, said, ended = list[str](), list[str](), list[int]()

    class Store:
        def claim_host(self, host: str) -> bool:
            claims.append(host)
            return claims.count(host) == 1

        def write(self, message: object) -> None:
            assert claims, "the others hear of it when this rank has said it"

    for name, instead in (("say", said.append), ("end_at_once", ended.append), ("arm_last_resort", lambda _: None)):
        monkeypatch.setattr(watchdog, name, instead)
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    for rank, host, heard in ((2, "a", False), (3, "a", True), (4, "a", True), (5, "b", True), (6, "b", True), (7, "b", False)):
        dog = Watchdog(stall=5)
        dog.rank, dog._host, dog._store = rank, host, Store()  # type: ignore[assignment]
        dog._end(Hang(cause="nothing moves", suspect=4), heard=heard)
    assert [text.split("This is ")[1][:6] for text in said if "error" in text] == ["rank 2", "rank 5", "rank 7"]
    assert len(ended) == 6 and [text.split(":")[0] for text in said if "error" not in text] == ["\nthreads of rank 4"]


def test_saying_the_same_again_is_no_move_and_no_stop() -> None:
    """A rank that hashes more files than another has not come further for it."""
    dog = Watchdog(stall=5)
    dog.at(3, "forward")
    moves, dog._since = dog._heartbeat().moves, dog._clock() - 100
    dog.phase("forward")
    assert dog._heartbeat().moves == moves and dog._heartbeat().seconds < 50
    dog.phase("backward")
    assert dog._heartbeat().moves == moves + 1


def test_a_rank_that_has_finished_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """While rank 0 still uploads."""
    dog, ended = Watchdog(stall=5), list[Hang]()
    monkeypatch.setattr(dog, "_end", ended.append)
    for done in (True, False):
        assert not ended
        beat = Heartbeat(step=9, phase="saving", host="h", done=done)
        dog._heard = {1: (beat, dog._clock() - 100)}
        dog._look_for_a_hang()
    assert [hang.suspect for hang in ended] == [1]


def test_silence_is_never_waited_for_longer_than_a_stall() -> None:
    assert Watchdog(stall=5).silence == 5 and Watchdog(stall=1e4).silence == 60


def test_one_rank_alone_that_hangs_is_ended() -> None:
    program = """
import time
from launch.ranks import watchdog
watchdog.BEAT_SECONDS = 0.2
dog = watchdog.Watchdog(stall=1).start()
dog.at(2, "forward")
time.sleep(60)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 17, done.stderr
    assert "error: no rank has moved for 1 s: rank 0 at step 2, forward" in done.stderr and "(MainThread)" in done.stderr


def test_time_asleep_does_not_count() -> None:
    """A process that is stopped for a while, and the same while spent awake."""
    program = """
import threading, time
from launch.ranks import watchdog
watchdog.ASLEEP_SECONDS = 0.5
clock, event = watchdog.AwakeClock(), threading.Event()
began, wall = clock(), time.monotonic()
print("ready", flush=True)
while clock() - began < 1.5:
    clock.wait(event, 0.1)
print(time.monotonic() - wall, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # into the loop: a sleep before it is none that the clock can know of
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=30)
    assert float(out) > 5.0  # 1.5 s awake and 4 s asleep


def test_the_clock_s_wait_hears_the_event() -> None:
    event = threading.Event()
    event.set()
    assert AwakeClock().wait(event, 10)


def test_stacks_name_the_threads_and_where_they_are() -> None:
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait, name="waiting one", daemon=True)
    thread.start()
    said = stacks()
    leave.set()
    assert "(waiting one), innermost call first" in said and "threading.py" in said
    assert "test_watchdog.py" in said.split("MainThread")[1]
