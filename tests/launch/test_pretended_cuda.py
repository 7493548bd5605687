"""The lines that only a GPU runs, run without one: accelerator, device count and random states pretended; and the list of them.

What this cannot show: kernels, streams and NCCL. `make gpu` runs those on one GPU; NCCL between several ranks nothing here
can prove.
"""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from support import OLD, ROOT
from torch.library import CustomOpDef

from data.cli import UserError
from launch.checkpoint.random_state import random_state, set_random_state
from launch.cli import make_quiet
from launch.engine.build import build_model
from launch.ranks import heartbeat, join
from launch.run import resolve
from launch.run.arguments import parse_arguments
from model import MoEGPTConfig, operators
from model.layers import to_device
from model.operators import on_its_device


class Cuda:
    """What was asked of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, accelerator: str, gpus: int) -> None:
        self.device: int | None = None
        self.state = torch.arange(16, dtype=torch.uint8)
        monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: accelerator)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.state.clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set_rng_state)

    def set_device(self, device: int) -> None:
        self.device = device

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`join.start` up to the process group, which is not made; what it is asked for."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: asked.update(options))
    monkeypatch.setattr(join, "wait_for_builds", lambda _: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "x")  # so that it is put back
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    return asked


def test_ranks_on_gpus_take_theirs_and_outlive_a_peer_long_enough_to_name_it(
    joining: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(monkeypatch, accelerator="cuda", gpus=4)
    join.start(timeout=60)
    assert cuda.device == 1 and joining["rank"] == 1
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"  # CleanUpOnly in ProcessGroupNCCL.hpp
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    join.start(timeout=60)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3", "the user's own setting stays"


def test_a_launcher_that_shows_each_rank_one_gpu(joining: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task=1; DeepSpeed takes its device by LOCAL_RANK."""
    cuda = Cuda(monkeypatch, accelerator="cuda", gpus=1)
    join.start(timeout=60)
    assert cuda.device == 0 and os.environ["LOCAL_RANK"] == "0"


def test_open_mpi_shows_each_rank_one_gpu(joining: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES by a wrapper of mpiexec's. DeepSpeed asserts that Open MPI's local rank is the one that it goes by:
    every rank but the first of a host ended, and the sentence blamed the JSON."""
    Cuda(monkeypatch, accelerator="cuda", gpus=1)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    join.start(timeout=60)
    engine: Any = SimpleNamespace()
    DeepSpeedEngine._configure_with_arguments(engine, None, None)
    assert engine.local_rank == 0


def test_two_ranks_on_one_gpu_are_told_by_nccl(joining: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects while they join, before a check of ours could ask."""
    said = "NCCL error in: ProcessGroupNCCL.cpp, invalid usage\nLast error:\n"

    def connect(**_: Any) -> None:
        raise torch.distributed.DistBackendError(said)

    Cuda(monkeypatch, accelerator="cuda", gpus=1)
    monkeypatch.setattr(deepspeed, "init_distributed", connect)
    with pytest.raises(torch.distributed.DistBackendError):
        join.start(timeout=60)
    said += "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4f000"
    with pytest.raises(
        UserError, match=f"^rank 1 and rank 0 have the same GPU of host {socket.gethostname()}; start one rank a GPU"
    ):
        join.start(timeout=60)


def test_ranks_on_cpus_leave_a_gpu_of_the_machine_alone(joining: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make quickstart` with two ranks on a machine with one GPU: the second died of its device's number."""
    cuda = Cuda(monkeypatch, accelerator="cpu", gpus=1)
    join.start(timeout=60)
    assert cuda.device is None and joining["rank"] == 1
    assert "cuda" not in random_state()


@pytest.mark.parametrize(("accelerator", "name"), [("cpu", "cpu_ep1_zero2.json"), ("cuda", "ep1_zero2.json")])
def test_the_default_strategy_is_the_accelerators(accelerator: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, accelerator=accelerator, gpus=8)
    read: list[Path] = []
    read_config = resolve.strategy.read_config
    monkeypatch.setattr(resolve.strategy, "read_config", lambda path: read.append(path) or read_config(path))
    flags = {"data": OLD / "tokens", "model": OLD / "model.json", "output": "unused", "sequence_length": 32, "max_steps": 5}
    arguments = parse_arguments([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
    resolve.resolve_run(arguments, world_size=1)
    assert [path.name for path in read] == [name]


def test_the_gpus_random_state_is_saved_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, accelerator="cuda", gpus=1)
    state = random_state()
    before, cuda.state = cuda.state, torch.zeros(16, dtype=torch.uint8)
    set_random_state(state)
    assert torch.equal(cuda.state, before)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cpu")
    cuda.state = torch.zeros(16, dtype=torch.uint8)
    set_random_state(state)  # resumed on a CPU
    assert not cuda.state.any()


def test_the_model_is_made_on_the_accelerators_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the host first: eight ranks with a copy of `4b` each would take 140 GB there."""
    monkeypatch.setattr(get_accelerator(), "current_device_name", lambda *_: "meta")
    model = build_model(MoEGPTConfig.preset("tiny"), seed=1, attn_implementation="sdpa")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_deepspeed_is_told_of_the_cpu_only_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    Cuda(monkeypatch, accelerator="cuda", gpus=1)
    # What silences this process would silence the tests that follow, pytest's own log handlers included.
    monkeypatch.setattr("logging.disable", lambda *_: None)
    monkeypatch.setattr("warnings.filterwarnings", lambda *_: None)
    monkeypatch.setattr("deepspeed.utils.logging.set_log_level_from_string", lambda *_: None)
    make_quiet()
    assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_quiet()
    assert os.environ.pop("DS_ACCELERATOR") == "cpu"


def test_to_a_gpu_a_tensor_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Host:
        device = torch.device("cpu")

        def is_pinned(self) -> bool:
            return "pinned" in done

        def pin_memory(self) -> Host:
            done.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> Host:
            done.append(f"{device} {non_blocking}")
            return self

    to_device(Host(), torch.device("cuda", 1))  # type: ignore[arg-type]
    assert done == ["pinned", "cuda:1 True"]
    to_device(Host(), torch.device("cuda", 1))  # type: ignore[arg-type]
    assert done[2:] == ["cuda:1 True"], "what the loader has pinned is not copied once more"


def test_a_kernel_runs_on_the_gpu_that_its_tensor_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on several, by `device_map`: Triton takes the current one, and says "Pointer argument cannot be accessed"."""
    entered: list[torch.device] = []

    @contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    class There:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entering)
    assert on_its_device(lambda x, y: y)(There(1), 5) == 5 and entered == [torch.device("cuda", 1)]
    assert on_its_device(len)([There(0), There(0)]) == 2 and len(entered) == 1
    assert {operator._init_fn.__code__.co_name for operator in vars(operators).values() if isinstance(operator, CustomOpDef)} == {
        "call"
    }


def test_nccl_out_of_memory_is_the_ranks_own_trouble() -> None:
    own = torch.distributed.DistBackendError("NCCL error: ncclUnhandledCudaError, Cuda failure 2 'out of memory'")
    assert not heartbeat.is_second_hand(own)
    assert heartbeat.is_second_hand(torch.distributed.DistBackendError("NCCL error: remote process exited"))


# ---------------------------------------------------------------------- the list

HERE, GPU = "tests/launch/test_pretended_cuda.py", "make gpu"
#: Every function with a line for CUDA in it, and what runs that line.
RUN_BY = {
    "launch/checkpoint/random_state.py:random_state": HERE,
    "launch/checkpoint/random_state.py:set_random_state": HERE,
    "launch/cli.py:make_quiet": HERE,
    "launch/engine/exchange.py:Exchange._copy_to_host": GPU,
    "launch/engine/hardware.py:identity": GPU,
    "launch/engine/hardware.py:memory": GPU,
    "launch/engine/hardware.py:gpu_name": "tests/launch/engine/test_hardware.py",
    "launch/toolchain.py:default_device": GPU,
    "launch/toolchain.py:trains_on_gpu": HERE,
    "launch/ranks/join.py:start": HERE,
    "launch/run/assemble.py:say_what_to_expect": GPU,
    "launch/run/health.py:forget_peak": "tests/launch/run/test_session.py",
    "launch/run/health.py:memory_bytes": "tests/launch/run/test_session.py",
    "launch/run/resolve.py:resolve_run": HERE,
    "launch/toolchain.py:check_toolchain": "tests/launch/test_toolchain.py",
    "launch/toolchain.py:unusable_gpu": "tests/launch/test_toolchain.py",
    "model/attention.py:_sdpa": "tests/model/test_attention.py",
    "model/flash.py:kernel_preference": "tests/model/test_flash.py",
    "model/flash.py:pick_kernel": GPU,
    "model/grouped.py:leaves_idle": "tests/model/test_grouped.py",
    "model/grouped.py:lacks_grouped_mm": "tests/model/test_grouped_kernel.py",
    "model/layers.py:_is_plain": "tests/model/test_layers.py",
    "model/layers.py:to_device": HERE,
    "model/operators.py:fits": GPU,
    "model/operators.py:on_its_device.call": HERE,
}


def functions_with_cuda(path: Path) -> set[str]:
    """Those that name torch.cuda or compare a device with "cuda"."""
    found = set()

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
            text = isinstance(child, ast.Constant) and child.value == "cuda"
            if text or (isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.cuda"):
                found.add(f"{path.relative_to(ROOT)}:{inner}")
            walk(child, inner)

    walk(ast.parse(path.read_text()), "")
    return found


def test_every_line_for_cuda_is_run_by_something() -> None:
    """The benchmarks are what `make gpu` runs, so they are not in the list."""
    paths = [path for folder in ("model", "data", "launch") for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in paths if "benchmarks" not in path.parts for name in functions_with_cuda(path)}
    assert found == RUN_BY.keys()
    assert all((ROOT / proof).is_file() for proof in RUN_BY.values() if proof != GPU)
