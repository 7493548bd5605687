"""Stopping: what a signal does, to a real process (the training around it is in tests/faults/test_signals.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support import ROOT

from launch.run.stop import ECHO_SECONDS

PROGRAM = """
import time
from types import SimpleNamespace
from launch.run.stop import StopRequest
from data.terminal import drain
stop = StopRequest().install()
stop.joined()
print("ready", flush=True)
while not stop.requested():
    time.sleep(0.01)
print("asked by", stop.reason, flush=True)
{then}
drain()
"""
WAIT = "time.sleep(30)"


def start(then: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_asks(number: int) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"asked by {signal.Signals(number).name}\n")
    later = " after 5 seconds" if number == signal.SIGTERM else ""  # before, it may be the launcher's repetition
    assert err == f"{signal.Signals(number).name}: saving after this step; once more{later} stops at once\n"


def test_what_the_kernel_repeats_every_second_does_not_stop_at_once() -> None:
    """Over the soft limit of CPU time SIGXCPU comes again and again: here three times."""
    process = start(WAIT)
    for _ in range(3):
        process.send_signal(signal.SIGXCPU)
        time.sleep(0.2)
    assert process.stdout and process.stdout.readline() == "asked by SIGXCPU\n"
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    assert process.communicate()[1] == "SIGXCPU: saving after this step; once more stops at once\n"


def test_a_terminal_that_goes_away_asks_nothing() -> None:
    process = start()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "asked by SIGTERM\n" and process.returncode == 0


def test_the_second_signal_stops_at_once() -> None:
    process = start(WAIT)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout and process.stdout.readline() == "asked by SIGUSR1\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 128 + signal.SIGUSR1


def test_sigterm_to_a_group_is_one_request_though_the_launcher_repeats_it() -> None:
    """`timeout 10h deepspeed ...`, systemd: each process gets it, and each rank the launcher's as well."""
    process = start(WAIT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "asked by SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(ECHO_SECONDS + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_the_second_signal_stops_a_process_that_waits_in_a_collective() -> None:
    """Deep in C++, where Python runs no handler: a store's `get` of a key that never comes."""
    process = start("import torch.distributed as d; print('waits', flush=True); d.HashStore().get('never')")
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "asked by SIGINT\n"
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


def test_one_ctrl_c_arrives_as_two_signals_and_is_one_request() -> None:
    """The terminal's SIGINT, and the SIGTERM of the DeepSpeed launcher that was interrupted as well."""
    process = start(WAIT)
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "asked by SIGINT\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


def test_a_late_signal_after_all_is_saved_changes_nothing() -> None:
    process = start("stop.disarm(); print('saved', flush=True); time.sleep(1)")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout and process.stdout.readline() == "asked by SIGUSR1\n"
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_the_clock_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the process's start on, in hours."""
    from launch.run import stop as module

    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stop = module.StopRequest()
    now[0] += 60
    stop.after(0)
    now[0] += 10**9
    assert not stop.requested()
    now[0] = 1060
    stop.after(2)
    for seconds, asked in ((7199.9, False), (7200, True)):
        now[0] = 1000 + seconds
        assert stop.requested() == asked
    assert stop.reason == "--max_hours"


LOADING = """
import time
from launch.run.stop import StopRequest
stop = StopRequest().install()
print("loads", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_until_all_ranks_have_joined_there_is_nothing_to_save(number: int) -> None:
    """Ctrl-C was answered with "saving after this step", and half a minute later, when all was loaded, with nothing to save."""
    process = subprocess.Popen([sys.executable, "-c", LOADING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "loads\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number and out == ""
    assert err == f"{signal.Signals(number).name}: training has not begun, so there is nothing to save; stopping at once\n"


def test_an_end_that_is_announced_is_waited_for_while_ranks_join() -> None:
    process = subprocess.Popen([sys.executable, "-c", LOADING.replace("30", "1")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "loads\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
