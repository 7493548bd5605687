"""DeepSpeed's `ds_to_universal` in a process of its own, which runs no code out of a checkpoint and ends with who started it.

It forks workers, which a process with GPUs and threads must not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.cli import UserError
from launch.checkpoint.unpickle import no_code_from_files, save_stages_by_value
from launch.checkpoint.weights import MOMENTUM, flat_masters, flat_moments
from launch.cli import CLONE
from launch.ranks.spawn import environment_of_no_rank


def run_converter(source: Path, target: Path, tick: Callable[[], object]) -> None:
    """Convert the checkpoint `source` into the new folder `target`; `tick` is called as it gets on. Raises UserError with the
    converter's last words."""
    command = [sys.executable, "-m", "launch.checkpoint.converter", str(source), str(target)]
    said: list[str] = []
    with subprocess.Popen(
        command,
        env=environment_of_no_rank(),
        cwd=CLONE,
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            tick()
        code = process.wait()
    if code:
        raise UserError(f"{source} could not be converted: {' '.join(' '.join(said).split())[-400:]}")
    (target.parent / "latest_universal").unlink(missing_ok=True)  # DeepSpeed's pointer; it names the temporary folder


def main(source: str, target: str) -> None:
    """What `run_converter` starts. Forked workers inherit the restriction; processes started anew would inherit the half that
    refuses more than it must."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.checkpoint.zero_checkpoint import ZeROCheckpoint

    strip_paddings = ZeROCheckpoint._strip_tensor_paddings

    def strip(checkpoint: ZeROCheckpoint, shard: dict[str, Any]) -> None:
        give_moments(shard["optimizer_state_dict"])
        strip_paddings(checkpoint, shard)

    ZeROCheckpoint._strip_tensor_paddings = strip
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method("fork")
    sys.argv = ["ds_to_universal", "--input_folder", source, "--output_folder", target]
    save_stages_by_value()
    with no_code_from_files():
        ds_to_universal.main(ds_to_universal.parse_arguments())


def give_moments(state: Mapping[str, Any]) -> None:
    """Zeros for the moments of the groups that have none, Muon's: the converter ends at the first of them. Of one rank, in place.

    `universal.py` takes them out again and puts the momentum beside, which is laid out otherwise. Moments are saved with their
    partition's padding, which the converter strips next, and masters without.
    """
    moments = flat_moments(state)
    steps = [held["step"] for held in moments.values() if "step" in held]
    for number, (master, padding) in enumerate(zip(flat_masters(state), state["group_paddings"], strict=True)):
        held = state["base_optimizer_state"]["state"].setdefault(number, {})
        if "exp_avg" not in held:
            held.pop(MOMENTUM, None)
            held.update({name: master.new_zeros(master.numel() + padding) for name in ("exp_avg", "exp_avg_sq")}, step=steps[0])


def _end_with_parent() -> None:
    # The parent holds the other end and writes nothing. Not `sys.stdin`: its lock would be held when workers are forked.
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
