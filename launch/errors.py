"""A user's mistake is one sentence on stderr and exit code 2, on every rank, never a traceback."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

#: What a person can get wrong. Anything else is a fault of the program and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
EXIT_USER_ERROR = 2


def describe(error: BaseException) -> str:
    """The error in one line: an OSError without a sentence of its own gets its file named."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def fail(error: BaseException) -> NoReturn:
    """Print `error: <sentence>` once (rank 0 speaks for all, an error of another rank names its rank) and exit."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    elif not getattr(error, "agreed", False):
        # Most mistakes are seen by all ranks alike; the launcher ends the others before this one is heard twice.
        print(f"error on rank {rank}: {describe(error)}", file=sys.stderr, flush=True)
    # Not sys.exit: threads of NCCL, gloo or W&B must not keep a failed rank (and with it the whole job) alive.
    sys.stdout.flush()
    os._exit(EXIT_USER_ERROR)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main`, turning a user's mistake into its sentence."""
    try:
        code = main()
    except USER_ERRORS as error:
        if os.environ.get("MOE_TRACEBACK"):
            raise
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    sys.exit(code or 0)


def make_quiet() -> None:
    """Only errors from the libraries: their warnings at start-up are none that a user could act on."""
    import torch

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string(os.environ.get("MOE_DEEPSPEED_LOG", "error"))
