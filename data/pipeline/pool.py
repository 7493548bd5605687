"""Blocks through workers, results in order: in this process, in processes of this host, or over MPI ranks.

At most `2 * workers + 1` blocks are under way, so memory does not grow with the input. A worker that dies (out of memory) ends the
job with a sentence; a job that dies (SIGKILL) takes its workers with it.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data.cli import LIMITS, ONE_THREAD, Exit, UserError
from data.pipeline.worker import Result, Worker, WorkOptions
from data.sources.blocks import Block
from data.terminal import drain

InOrder = Callable[[Iterable[Block]], Iterator[Result]]

_worker: Worker | None = None
KILLED = (
    "a worker process was killed, most likely for want of memory; run the same command again with fewer --workers, it goes on "
    "from what is there"
)
TOO_MANY = (
    "a worker process, or a thread of it, could not be started (ulimit -u, a container's pids); raise the limit, or run the same "
    "command again with fewer --workers, it goes on from what is there"
)
NO_THREAD_CODE = 3  # with which a worker ends that can start none
#: In which the pool's own answer to a killed worker comes, if it does.
KILL_GRACE_SECONDS = 10.0


class Team:
    """Who does the work. `start(options)` gives a function from blocks to results in the same order."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @contextmanager
    def start(self, options: WorkOptions) -> Iterator[InOrder]:
        if self.workers == 1:
            worker = Worker(options)
            yield lambda blocks: (_run(worker, block) for block in blocks)
            return
        with _processes(self.workers, options) as pool:
            yield lambda blocks: in_order(blocks, pool, self.workers)


@contextmanager
def _processes(workers: int, options: WorkOptions) -> Iterator[Executor]:
    # One thread a worker: the pool is the parallelism.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", **ONE_THREAD)
    # A process with threads must not fork; one without saves each worker the interpreter, the imports and the tokenizer (0.4 s).
    drain()
    method = "fork" if _threads() == 1 else "spawn"
    if method == "fork":
        start_worker(options)
    context = _remembering(multiprocessing.get_context(method))
    with ExitStack() as around:
        path = ""  # what is forked has the options already
        if method == "spawn":
            path = around.enter_context(_in_a_file(options))
            around.enter_context(_no_hang_after_a_kill(context.started))
        with _shared_memory_named():
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(path,))
        try:
            with _dead_workers_named(context.started):
                with _without_interrupts():
                    for _ in range(workers):
                        submit(pool, os.getpid)  # starts one process, as long as none is idle
                if method == "fork":  # only now: it is a thread
                    around.enter_context(_no_hang_after_a_kill(context.started))
                yield pool
        finally:  # before the file goes, which a worker may yet read
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _shared_memory_named() -> Iterator[None]:
    """The locks of the pool's queues lie in /dev/shm, which a container may not have; the error names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in LIMITS:
            raise
        raise UserError(
            f"worker processes share locks in /dev/shm, and it cannot be written ({error.strerror}); mount it, or give --workers 1"
        ) from error


def _remembering(context: Any) -> Any:
    """`context`, which keeps the processes started through it in its list `started`: the pool and `active_children` forget a
    dead one, and one may be killed before anybody has looked."""
    own = copy.copy(context)  # the other is everybody's

    def process(*arguments: Any, **named: Any) -> Any:
        own.started.append(context.Process(*arguments, **named))
        return own.started[-1]

    own.started, own.Process = [], process
    return own


@contextmanager
def _no_hang_after_a_kill(started: list[Any]) -> Iterator[None]:
    """The pool itself may wait for ever: for the second half of a message in whose middle a worker was killed, and before Python
    3.11.5 for one to take what it has half sent. Then this ends the job; what is on disk is as good as after any kill."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if any(process.exitcode for process in list(started)) and not over.wait(KILL_GRACE_SECONDS):
                print(f"error: {_why_dead(started)}", file=sys.stderr, flush=True)
                os._exit(Exit.USER_ERROR)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _in_a_file(options: WorkOptions) -> Iterator[str]:
    """Not through the pipe that starts a process: a tokenizer does not fit into it, and the parent would wait for ever for a
    process that was killed before it had read it."""
    descriptor, path = tempfile.mkstemp(prefix="moe_preprocess_")
    try:
        with open(descriptor, "wb") as file:
            pickle.dump(options, file)
        yield path
    finally:
        os.unlink(path)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in here leave Ctrl-C to their parent from their first moment on: they inherit that it is blocked.

    Here one that comes meanwhile, to whichever thread, is raised at the end.
    """
    came: list[int] = []
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main_thread else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main_thread:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _threads() -> int:
    """Of this process, those of libraries included."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:  # no Linux: fork is not to be trusted there
        return 0


def _start_process(path: str) -> None:
    """In each worker: die with the parent, load the tokenizer once unless it came with the fork."""
    try:
        threading.Thread(target=_die_with_parent, daemon=True).start()
    except RuntimeError:
        os._exit(NO_THREAD_CODE)
    if _worker is None:
        start_worker(pickle.loads(Path(path).read_bytes()))


def start_worker(options: WorkOptions) -> None:
    global _worker
    _worker = Worker(options)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def run_block(block: Block) -> Result:
    assert _worker is not None
    return _run(_worker, block)


def _run(worker: Worker, block: Block) -> Result:
    try:
        return worker.run(block)
    except MemoryError as error:
        raise UserError(
            f"not enough memory for a block of {block.name}; run the same command again with fewer --workers, it goes on from what "
            "is there"
        ) from error


def in_order(blocks: Iterable[Block], pool: Executor, workers: int) -> Iterator[Result]:
    """The results of all blocks, in the order of the blocks."""
    pending: deque[Any] = deque()
    for block in read_ahead(blocks, workers):
        pending.append(submit(pool, run_block, block))
        if len(pending) > 2 * workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def submit(pool: Executor, function: Callable[..., Any], *arguments: object) -> Future[Any]:
    """As `pool.submit`, and a pool that breaks while this call starts a process of it is broken.

    Raises BrokenProcessPool, and UserError where there can be no more processes. The executor's own thread closes the pipes that
    the new process is about to inherit: "handle is closed" or "bad value(s) in fds_to_keep" says CPython then.
    """
    try:
        return pool.submit(function, *arguments)
    except (OSError, ValueError) as error:
        if isinstance(error, BlockingIOError):  # of a fork
            _kill_workers()
            raise UserError(TOO_MANY) from error
        pool.submit(os.getpid)  # says so where the pool is broken
        raise


@contextmanager
def _dead_workers_named(started: list[Any]) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        _kill_workers()
        raise UserError(_why_dead(started)) from error


def _kill_workers() -> None:
    """The executor's thread ends them, but it may not be there yet, and one that was started while it ended the others is waited
    for, for ever."""
    for process in multiprocessing.active_children():
        process.kill()


def _why_dead(started: list[Any]) -> str:
    return TOO_MANY if any(process.exitcode == NO_THREAD_CODE for process in started) else KILLED


def read_ahead(blocks: Iterable[Block], count: int) -> Iterator[Block]:
    """Read in a thread, `count` blocks ahead: decompression releases the interpreter lock."""
    ready: queue.Queue[Any] = queue.Queue(count)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.5)
            except queue.Full:
                pass

    def read() -> None:
        try:
            for block in blocks:
                put(block)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # It may be in the middle of a large file's check; it is a daemon and need not be waited for.
        thread.join(timeout=1.0)
