"""From the files of a verified checkpoint to an engine that goes on where it was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from data.cli import UserError, sentence
from launch.checkpoint import universal
from launch.checkpoint.buffers import BUFFERS, restore_buffers
from launch.checkpoint.choose import ResumeFrom
from launch.checkpoint.engine_files import CheckpointFiles, going_through
from launch.checkpoint.random_state import set_random_state
from launch.checkpoint.unpickle import expecting_sense, hearing_of_loads, no_code_from_files
from launch.checkpoint.weights import check_master
from launch.manifest import read_manifest
from launch.ranks.control_group import ControlGroup


def random_state_name(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def restore(
    engine: DeepSpeedEngine, choice: ResumeFrom, folder: Path, ranks: ControlGroup, on_read: Callable[[], object] = lambda: None
) -> None:
    """Engine, buffers and random states. `folder`: the checkpoint itself, or its conversion. `on_read`: called as files are read,
    for a watchdog. Collective.

    Raises UserError with what the files hold that cannot be used; of a file that DeepSpeed reads, on all ranks before any of them
    waits for another inside DeepSpeed.
    """
    converted = bool(choice.conversions)
    # With that setting one rank after the other reads; not of a conversion, see `_universal_loading`.
    one_by_one = engine._config.zero_config.pipeline_loading_checkpoint and not converted
    together = None if one_by_one else ranks.run_everywhere
    files = CheckpointFiles(folder, name=folder.name, records=read_manifest(folder)["files"], together=together, on_part=on_read)
    listed = read_manifest(choice.path)["files"]
    own_files = CheckpointFiles(choice.path, name=choice.path.name, records=listed, on_part=on_read)
    with (
        hearing_of_loads(on_read),  # of a conversion DeepSpeed reads most past `files`
        _universal_loading(engine, converted),
        going_through(files, engine),
        no_code_from_files(),
        expecting_sense(folder),
    ):
        if converted:
            universal.load(engine, folder, together=ranks.run_everywhere)
        else:
            _load_plainly(engine, folder)
    _check_masters(engine, choice.path)
    with expecting_sense(choice.path):
        restore_buffers(engine.module, own_files.load(str(choice.path / BUFFERS)))
    own = choice.path / random_state_name(ranks.rank)
    if own.is_file():
        with expecting_sense(own):
            set_random_state(own_files.load(str(own)))
    else:  # a rank that the saved run did not have: not the numbers of step 0 once more
        # torch tells a negative seed as one of 64 bits without a sign.
        torch.manual_seed((torch.initial_seed() + choice.state.step) % 2**64)


def _load_plainly(engine: DeepSpeedEngine, folder: Path) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=".")
    except RuntimeError as error:
        if "same parameter placement" in str(error):
            default = DeepSpeedZeroConfig.model_fields["sub_group_size"].default
            raise UserError(
                f"{folder} was saved with another zero_optimization.sub_group_size than {engine.zero_sub_group_size():,}, by which "
                f"ZeRO 3 lays out its state; give it as it was then ({default:,} where the JSON did not name it)"
            ) from error
        if "parameter_alignment" not in str(error):
            raise
        raise UserError(f"{folder}: {sentence(error)}") from error
    if loaded is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}")


def _check_masters(engine: DeepSpeedEngine, path: Path) -> None:
    """ZeRO 1 and 2: what was loaded into the optimizer's partition is what was loaded into the module, or the first step would
    write other weights there. Raises UserError."""
    zero = engine.optimizer
    for number, master in enumerate(getattr(zero, "single_partition_of_fp32_groups", ())):
        rank = torch.distributed.get_rank(zero.real_dp_process_group[number])
        weights = zero.parallel_partitioned_bit16_groups[number][rank]
        check_master(master.detach(), weights.detach(), path, f"a partition of parameter group {number}")


@contextmanager
def _universal_loading(engine: DeepSpeedEngine, on: bool) -> Iterator[None]:
    """DeepSpeed reads this from the JSON once; an engine that started from a conversion may roll back to a plain one.

    Of a conversion no rank tells the next that it has read its part, for which `pipeline_loading_checkpoint` makes that one wait.
    """
    config, zero = engine._config, engine._config.zero_config
    one_by_one = zero.pipeline_loading_checkpoint and not on
    with patch.object(config, "load_universal_checkpoint", on), patch.object(zero, "pipeline_loading_checkpoint", one_by_one):
        yield
