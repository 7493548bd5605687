"""Reading pickled files without running anything that stands in them.

A pickle can name any function to be called with any arguments. torch's restricted unpickler builds tensors, plain containers
and the classes that it is told of; the few of DeepSpeed's that its checkpoints need are told to it here, and nothing else is
ever unpickled: not by us, and not by DeepSpeed, whose own code asks for the unrestricted kind in some thirty places.
"""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.cli import UserError

#: With it torch.load is restricted even where its caller says `weights_only=False`. Child processes inherit it.
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
#: Its opposite, for files that somebody trusts; torch refuses to load anything where both are set.
FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def allowed_classes() -> list[Any]:
    """DeepSpeed's classes in its checkpoints: numbers and flags, no behaviour of their own at unpickling."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def save_stages_by_value() -> None:
    """From here on this process pickles ZeRO's stage as its class and its number. Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2)
    pickle an enum's member as a call of `getattr`, which is refused when the file is read."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda member: (ZeroStageEnum, (member.value,)))


def load_file(path: Path | str, *, mmap: bool = True, content: BinaryIO | None = None) -> Any:
    """One pickled file on the CPU, tensors mapped from disk; or `content`, which was read from it.

    Raises UserError where the file holds anything else or is no such file at all. Its checksum cannot tell: whoever can write the
    file can write the manifest.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            if content is not None:
                return torch.load(content, map_location="cpu", weights_only=True)
            # torch maps by the name, which it wants as text; a name of other bytes is read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _is_text(os.fspath(path)))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a hostile file the unpickler may raise anything
        raise UserError(
            f"{path} cannot be read, though its checksum is right: it holds something other than tensors and plain "
            f"values, and nothing else is loaded ({_first_line(error)})"
        ) from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return False
    return True


@contextmanager
def expecting_sense(folder: Path) -> Iterator[None]:
    """While open, content of another shape than a checkpoint's (a list where a table should be, a key that is missing) is refused,
    and what DeepSpeed finds in files that it reads itself.

    Raises UserError with the folder; MOE_TRACEBACK=1 shows the line that could not use it.
    """
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{folder} holds something other than tensors, and nothing else is loaded: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder} does not hold what a checkpoint holds, though its checksums are right ({type(error).__name__}: "
            f"{_first_line(error)}); take an older checkpoint"
        ) from error


@contextmanager
def hearing_of_loads(on_load: Callable[[], object]) -> Iterator[None]:
    """While open, `on_load` is called after every `torch.load` of this process, DeepSpeed's own included."""
    theirs = torch.load

    def load(*args: Any, **options: Any) -> Any:
        content = theirs(*args, **options)
        on_load()
        return content

    torch.load = load
    try:
        yield
    finally:
        torch.load = theirs


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__


@contextmanager
def no_code_from_files() -> Iterator[None]:
    """While open, every `torch.load` of this process and of those it starts is restricted, DeepSpeed's own included."""
    before = {name: os.environ.get(name) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    os.environ.pop(FORCE_NOT, None)
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
