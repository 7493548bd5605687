"""Workers give the bytes of one process, and die with their job."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import command, contents, environment, run

from data.cli import UserError
from data.pipeline import pool
from data.pipeline.worker import WorkOptions


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(expected: Path, flags: list[object], tmp_path: Path, workers: int) -> None:
    done = run(*flags, "--output", tmp_path / "out", "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def test_no_shared_memory_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The semaphores' error names no file: all that was said is `Read-only file system`."""
    options: Any = SimpleNamespace()
    monkeypatch.setattr(pool, "start_worker", lambda _: None)

    def no_semaphore(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", no_semaphore)
    with pytest.raises(UserError, match=r"/dev/shm.*Read-only file system.*--workers 1"), pool.Team(2).start(options):
        pass


def test_workers_die_with_a_killed_job_and_a_killed_worker_is_a_sentence(flags: list[object], tmp_path: Path) -> None:
    def children(pid: int) -> list[int]:
        found = []
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def alive(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    for victim in ("job", "worker"):
        # A worker's start takes some 0.5 s: long enough to be found in it.
        process = subprocess.Popen(
            command(*flags, "--output", tmp_path / victim, "--workers", 2), env=environment(), stderr=subprocess.PIPE, text=True
        )
        while len(found := children(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.01)
        assert len(found) >= 2
        os.kill(process.pid if victim == "job" else found[-1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while any(map(alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, found))
        if victim == "worker":
            assert process.returncode == 2, err
            assert "a worker process was killed" in err and "Traceback" not in err


@pytest.mark.parametrize("workers", [1, 2])
def test_running_out_of_memory_is_a_sentence(workers: int, tmp_path: Path, corpus: Path, tokenizer_file: Path) -> None:
    script = (
        "import sys; from data import preprocess; from data.pipeline import pool, worker\n"
        "pool._threads = lambda: 1\n"  # a library that has started one would have workers spawned, without what follows
        "def out_of_memory(*_): raise MemoryError\n"
        "worker.Worker.select = out_of_memory\n"
        "sys.exit(preprocess.main(sys.argv[1:]))\n"
    )
    line = command("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--workers", workers)
    done = subprocess.run([line[0], "-c", script, *line[2:]], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2 and "not enough memory for a block of" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_while_workers_start_is_kept() -> None:
    inside, handler = False, signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), pool._without_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        inside = True
    assert inside and signal.getsignal(signal.SIGINT) == handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "the next one comes at once"


def test_a_worker_killed_before_the_first_block_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in its start breaks the pool before anything is submitted to it."""

    class Broken:
        def __init__(self, *_: object, **__: object) -> None: ...

        def submit(self, *_: object) -> None:
            raise BrokenProcessPool

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Broken)
    monkeypatch.setattr(pool, "start_worker", lambda options: None)
    with pytest.raises(UserError, match="a worker process was killed"), pool._processes(2, None):  # type: ignore[arg-type]
        raise AssertionError("it has not started")


NO_THREADS = """
import threading
from data.pipeline import pool
if __name__ == "__main__":
    def refuse(thread):
        if thread._target is pool._die_with_parent:
            raise RuntimeError("can't start new thread")
        start(thread)
    start, threading.Thread.start, pool.start_worker = threading.Thread.start, refuse, lambda options: None
    try:
        with pool._processes(2, None) as workers:
            list(pool.in_order(range(8), workers, 2))
    except pool.UserError as error:
        print(error)
"""


NO_FORK = """
import errno, os
from data.terminal import exit_code, leave
from data.pipeline import pool
if __name__ == "__main__":
    def refuse(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    left, fork, pool._worker, pool.start_worker = [1, 2], os.fork, object(), lambda options: None
    os.fork = lambda: fork() if left.pop() == 2 else refuse()
    def main():
        assert pool._threads() == 1  # or workers are spawned
        with pool._processes(3, None) as workers:
            list(pool.in_order(range(8), workers, 3))
    leave(exit_code(main))
"""


def test_workers_that_were_forked_before_the_limit_are_not_waited_for() -> None:
    """Nothing told them to end: the sentence came, and the command stayed."""
    done = subprocess.run(
        [sys.executable, "-c", NO_FORK],
        capture_output=True,
        text=True,
        env=environment() | {"OPENBLAS_NUM_THREADS": "1"},
        check=False,
        timeout=50,
    )
    assert done.returncode == 2 and done.stderr == f"error: {pool.TOO_MANY}\n", done.stderr


def test_a_limit_of_processes_is_named() -> None:
    """Threads count as processes: a worker that could start none was "killed, most likely for want of memory", after tracebacks."""
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS], capture_output=True, text=True, env=environment(), check=False, timeout=50
    )
    assert done.stdout == f"{pool.TOO_MANY}\n" and not done.stderr, done.stderr

    class Full(ProcessPoolExecutor):
        def submit(self, *_: object) -> Any:  # type: ignore[override]
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with pytest.raises(UserError, match="fewer --workers"):
        pool.submit(Full(1), os.getpid)


@pytest.mark.parametrize("error", [OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")])
@pytest.mark.parametrize("broken", [True, False])
def test_a_pool_that_breaks_while_it_starts_a_process_is_broken(error: Exception, broken: bool) -> None:
    class Pool(ProcessPoolExecutor):
        answers = iter([error, BrokenProcessPool() if broken else None])

        def submit(self, *_: object) -> Any:  # type: ignore[override]
            if answer := next(self.answers):
                raise answer

    with pytest.raises(BrokenProcessPool if broken else type(error)):
        pool.submit(Pool(1), os.getpid)


def test_what_starts_a_worker_fits_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer does not: the job would wait for ever for a process that was killed before it had read it."""
    options: Any = SimpleNamespace(tokenizer_json="x" * 1_000_000)
    with pool._in_a_file(options) as path:
        assert len(pickle.dumps(path)) < 4096
        started: list[WorkOptions] = []
        monkeypatch.setattr(pool, "_worker", None)
        monkeypatch.setattr(pool, "start_worker", started.append)
        pool._start_process(path)
    assert started == [options] and not Path(path).exists()


@pytest.mark.parametrize("before_the_watch", [False, True])
def test_a_pool_that_waits_for_ever_after_a_kill_is_ended(before_the_watch: bool) -> None:
    """Also where the worker was gone, and forgotten, before anybody looked: under Python 3.11.2 three kills of fifteen, each
    while workers start, were followed by silence for ever."""
    kill = "os.kill(process.pid, 9); process.join(); assert multiprocessing.active_children() == []"
    script = (
        "import multiprocessing, os, time; from data.pipeline import pool\n"
        "pool.KILL_GRACE_SECONDS = 0.5\n"
        "if __name__ == '__main__':\n"
        "    context = pool._remembering(multiprocessing.get_context('fork'))\n"
        "    process = context.Process(target=time.sleep, args=(60,))\n"
        f"    process.start(); {kill if before_the_watch else 'pass'}\n"
        "    with pool._no_hang_after_a_kill(context.started):\n"
        f"        time.sleep(1); {'pass' if before_the_watch else kill}; time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=False, timeout=50
    )
    assert done.returncode == 2 and done.stderr == f"error: {pool.KILLED}\n"
