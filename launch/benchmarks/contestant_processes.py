"""Contestants that take turns, each in processes of its own: what one does to its process is no other's gain or loss.

Our engine tells the C library to keep freed memory, the knobs replace functions of DeepSpeed's, and each fills its allocators
with blocks of its own sizes. Whoever uses one of them has the others nowhere near. So every rank of the benchmark starts one
process for each contestant; these join among themselves, and all but one of them sleep.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from data.cli import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from launch.benchmarks.contestants import Contestant
    from model import MoEGPTConfig

PHASES = ("forward", "backward", "optimizer")

#: How a process is made; a fork would share what imports have started.
START = "spawn"
#: For a collective, in seconds.
TIMEOUT = 600.0
Seconds = dict[str, float]


class Remote:
    """A contestant's process of this rank. It begins with its imports at once, and builds when it is told to."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        context: Any = multiprocessing.get_context(START)
        self.name = name
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def build(self) -> None:
        """Returns when it could take a step. Collective."""
        self._ask("build")

    def step(self) -> Seconds:
        """One training step, by phase. Collective."""
        return self._ask("step")

    def _ask(self, what: str) -> Seconds:
        try:
            self.ours.send(what)
            answer: Seconds = self.ours.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        return answer

    def _ended(self) -> BaseException:
        self.process.join()
        code = self.process.exitcode or 0
        if code > 0:  # it has said why
            return SystemExit(code)
        by = f"by {signal.Signals(-code).name}" if code else "before its time"
        return UserError(f"{self.name}: its process has ended {by}; if for memory, take fewer --contestants or a smaller model")


@contextlib.contextmanager
def contestants(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[list[Remote]]:
    """One of each name, at its imports; they end when this does."""
    remotes: list[Remote] = []
    try:
        for name in names:
            remotes.append(Remote(name, arguments))
        yield remotes
    finally:
        for remote in remotes:
            remote.process.kill()
            remote.process.join()


def serve(name: str, arguments: argparse.Namespace, asked: Connection) -> None:
    """What a contestant's process does."""
    from launch.cli import make_quiet, run_command

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark's own process answers Ctrl-C, and ends this one
    make_quiet()
    run_command(lambda: _take_steps(name, arguments, asked))


def _take_steps(name: str, arguments: argparse.Namespace, asked: Connection) -> None:
    from launch.benchmarks.contestants import CONTESTANTS, Stage

    with contextlib.suppress(EOFError):  # nobody is there any more
        asked.recv()
        _join(name)
        stage = Stage(arguments)
        contestant, tokens = CONTESTANTS[name](stage, name), make_tokens(arguments, stage.config)
        asked.send({})
        while True:
            asked.recv()
            asked.send(timed_step(contestant, tokens))


def _join(name: str) -> None:
    """The processes of one contestant, by the store of those that started them: a port of its own could be taken meanwhile."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from launch.ranks import join

    rank, ranks = join.set_environment()
    timeout = timedelta(seconds=TIMEOUT)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=PrefixStore(name, store), rank=rank, world_size=ranks, timeout=timeout)
    join.start(TIMEOUT)


def make_tokens(arguments: argparse.Namespace, config: MoEGPTConfig) -> list[Tensor]:
    """This rank's micro-batches of a step, the same for every contestant."""
    import torch
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (arguments.micro_batch, arguments.sequence_length + 1)
    batches = [torch.randint(0, min(4096, config.vocab_size), shape, generator=generator) for _ in range(arguments.accumulation)]
    return [tokens.to(deepspeed_device()) for tokens in batches]


def deepspeed_device() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def timed_step(contestant: Contestant, micro_batches: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of one optimizer step by phase, each of which ends when the device has; `cpu` is this process's CPU time."""
    from launch.benchmarks.measure import synchronize

    device = micro_batches[0].device
    seconds = dict.fromkeys(PHASES, 0.0)
    synchronize(device)
    now, cpu = time.perf_counter(), time.process_time()

    def end(phase: str) -> None:
        nonlocal now
        synchronize(device)
        before, now = now, time.perf_counter()
        seconds[phase] += now - before

    for number, tokens in enumerate(micro_batches):
        loss = contestant.forward(tokens)
        end("forward")
        contestant.backward(loss, last=number == len(micro_batches) - 1)
        end("backward")
    contestant.update()
    end("optimizer")
    return {**seconds, "cpu": time.process_time() - cpu}
