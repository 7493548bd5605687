"""What the commands of `launch/` share beyond `data.cli`: one sentence for all ranks, and quiet libraries.

The two kinds of error and the table of exit codes are `data.cli`'s. Ranks add two questions: who speaks, and who was first.

MOE_DEEPSPEED_LOG=info|warning|error in the environment sets DeepSpeed's log level (error); MOE_TRACEBACK=1 is `data.cli`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data.cli import Exit, UserError, encoding_fault, hold_standard_streams
from data.terminal import drain, leave, report
from model.config_json import MOST_POSITIONS

CLONE = Path(__file__).resolve().parent.parent


class AgreedError(UserError):
    """A mistake that every rank raises alike, so that rank 0 speaks for all."""


class RankFailedError(RuntimeError):
    """Another rank has failed with a fault of the program; it has the traceback, this one only ends."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and end the process: a user's mistake as its sentence, anything else with its traceback.

    Processes that it starts (`python -P -m`) are this clone's as well. An installed copy is found anyway, and its folder has all
    other packages, which would come before those of a user's PYTHONPATH.
    """
    hold_standard_streams()
    if (CLONE / "setup.py").is_file():
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        if fault := encoding_fault():
            raise AgreedError(fault)
        code = main() or Exit.DONE
    except SystemExit as left:  # argparse has spoken already
        leave(left.code if isinstance(left.code, int) else Exit.USER_ERROR)
    except (Exception, KeyboardInterrupt) as error:
        # Not sys.exit: threads of NCCL, gloo or W&B must not keep a failed rank (and with it the whole job) alive.
        # The rank is asked for now: srun and mpiexec have other names for it, which `main` has translated.
        end_at_once(speak(error, int(os.environ.get("RANK", "0"))))
    leave(code)


def check_docstrings() -> None:
    """Refuse a Python without them to a command that loads transformers, which fills them in when it is imported."""
    if sys.flags.optimize > 1:
        raise AgreedError("Python runs without docstrings, and transformers needs them; unset PYTHONOPTIMIZE, or leave out -OO")


def check_rope_factor(factor: float | None) -> None:
    """Raises UserError for one that no context can be extended by."""
    if factor is not None and not 1 <= factor <= MOST_POSITIONS:
        raise UserError(f"--rope_factor must be from 1 to {MOST_POSITIONS:,}, not {factor}")


def check_utf8(text: str, name: str) -> None:
    """Raises UserError for half a surrogate pair, which is how Python holds bytes that are no UTF-8. `name`: what the text is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is no UTF-8: character {error.start} is half a surrogate pair, {text[error.start]!r}") from None


def speak(error: BaseException, rank: int) -> int:
    """Say why this rank ends, unless rank 0 says it for all; returns the exit code."""
    if rank and isinstance(error, AgreedError) and not os.environ.get("MOE_TRACEBACK"):
        return Exit.USER_ERROR
    return report(error, who=f"rank {rank}" if rank else "")


def end_at_once(code: int) -> NoReturn:
    """Leave without the interpreter's clean-up, which waits for other threads; what was said is written, if somebody reads."""
    drain()
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            sys.stdout.flush()
    os._exit(code)


def make_quiet() -> None:
    """Only errors from the libraries: their warnings at start-up are none that a user could act on. For what loads transformers."""
    check_docstrings()
    import torch

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    with contextlib.suppress(ModuleNotFoundError):  # the benchmarks of attention, loss and experts run without DeepSpeed
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string(os.environ.get("MOE_DEEPSPEED_LOG", "error"))
