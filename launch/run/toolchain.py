"""What a GPU needs at run time: a driver that PyTorch can use; a compiler, for Triton builds a launcher in C for every kernel.

AutoEP's kernels are Triton's on every GPU, so the first forward would end in a traceback of a compiler that is not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from data.cli import UserError, sentence

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


def check_toolchain() -> None:
    """On a GPU: Raises UserError with what is missing and the packages that have it."""
    if get_accelerator().device_name() != "cuda":
        return
    missing = missing_tools(os.environ, Path(sysconfig.get_paths()["include"]))
    if missing:
        raise UserError(
            f"training on a GPU compiles kernels, and this host lacks {' and '.join(missing)}; install them, "
            "on Debian and Ubuntu with apt-get install gcc python3-dev"
        )


def check_driver(chosen: str | None, devices: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia/version")) -> None:
    """Refuse to train on the CPU beside a GPU of NVIDIA's that PyTorch cannot use, unless the accelerator was `chosen`
    (DS_ACCELERATOR). Raises UserError with PyTorch's reason: a driver older than its CUDA, a build without any.
    """
    if chosen or get_accelerator().device_name() != "cpu" or not any(map(_opens, devices.glob("nvidia[0-9]*"))):
        return
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        found = ""
        with contextlib.suppress(OSError, TypeError):
            found = f", driver {re.search(r'[0-9]{3}[.][0-9.]+', driver.read_text())[0]}"  # type: ignore[index]
        raise UserError(
            f"this host has an NVIDIA GPU that PyTorch {torch.__version__} (CUDA {torch.version.cuda}{found}) cannot use: "
            f"{sentence(error).rstrip('.')}; update the driver or install another build of PyTorch (README.md), or set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        ) from None


def _opens(device: Path) -> bool:
    """A job that was given no GPU sees its file all the same."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
