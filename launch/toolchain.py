"""What the machine brings: a driver that PyTorch can use, a compiler (Triton builds a launcher in C for every kernel), bf16.

Our kernels and AutoEP's are Triton's on every GPU, so the first forward would end in a traceback of a compiler that is not there.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from data.cli import UserError, sentence
from data.terminal import say

#: In the order in which Triton (3.x, runtime/build.py) looks; the variable CC goes before.
COMPILERS = ("gcc", "clang", "cc")


def missing_tools(environment: Mapping[str, str], include: Path) -> list[str]:
    """What Triton will not find, by name. `include`: where this Python's C headers belong."""
    path = environment.get("PATH", "")
    named = environment.get("CC")
    wanted = (named,) if named else COMPILERS
    missing = [] if any(shutil.which(name, path=path) for name in wanted) else [f"a C compiler ({' or '.join(wanted)})"]
    if not (include / "Python.h").is_file():
        missing.append(f"Python's headers ({include / 'Python.h'})")
    return missing


def check_toolchain(device: str) -> None:
    """On a `device` of CUDA's: Raises UserError with what is missing and the packages that have it."""
    if torch.device(device).type != "cuda":
        return
    missing = missing_tools(os.environ, Path(sysconfig.get_paths()["include"]))
    if missing:
        raise UserError(
            f"on a GPU kernels are compiled, and this host lacks {' and '.join(missing)}; install them, "
            "on Debian and Ubuntu with apt-get install gcc python3-dev"
        )


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16: AVX512_BF16 on x86, else what oneDNN finds.

    Without them bf16 takes 2.7 times as long as fp32 with AVX-512, and some ten times with AVX2 (launch/benchmarks/README.md).
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trains_on_gpu() -> bool:
    """Whether this process trains on a GPU: DeepSpeed's accelerator says so, not what the machine has. Beside a GPU ranks may train
    on the CPU (DS_ACCELERATOR=cpu)."""
    from deepspeed.accelerator import get_accelerator  # here: not every command loads it

    return bool(get_accelerator().device_name() == "cuda")


def default_device() -> str:
    """A GPU where there is one; where PyTorch cannot use it, the CPU, and a warning that says why."""
    if torch.cuda.is_available():
        return "cuda"
    _warn_of_unusable_gpu()
    return "cpu"


@cache
def _warn_of_unusable_gpu() -> None:
    if said := unusable_gpu():
        say(f"warning: {said}; until then this runs on the CPU")


def check_driver(chosen: str | None) -> None:
    """Refuse to train on the CPU beside a GPU of NVIDIA's that PyTorch cannot use, unless the accelerator was `chosen`
    (DS_ACCELERATOR). Raises UserError with what `unusable_gpu` says.
    """
    if not chosen and (said := unusable_gpu()):
        raise UserError(f"{said}, or set DS_ACCELERATOR=cpu to train on the CPU")


def unusable_gpu(devices: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Why PyTorch cannot use a GPU that this process may open, and what to do: its driver is too old, the build has no CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # by the user; by Slurm, from a job without GPUs
    if hidden or torch.cuda.is_available() or not any(map(_opens, devices.glob("nvidia[0-9]*"))):
        return None
    try:
        torch.cuda.init()
        return None
    except (AssertionError, RuntimeError) as error:
        found = ""
        with contextlib.suppress(OSError, TypeError):
            found = f", driver {re.search(r'[0-9]{3}[.][0-9.]+', driver.read_text())[0]}"  # type: ignore[index]
        return (
            f"this host has an NVIDIA GPU that PyTorch {torch.__version__} (CUDA {torch.version.cuda}{found}) cannot use: "
            f"{sentence(error).rstrip('.')}; update the driver or install another build of PyTorch (README.md)"
        )


def _opens(device: Path) -> bool:
    """A job that was given no GPU sees its file all the same."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
