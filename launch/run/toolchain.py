"""What a GPU needs at run time beside its driver: Triton compiles a small launcher in C for every kernel that it builds.

AutoEP's kernels are Triton's on every GPU, so the first forward would end in a traceback of a compiler that is not there.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from data.cli import UserError

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
