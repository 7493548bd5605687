"""Train a MoE GPT on preprocessed shards.

deepspeed --num_gpus 8 launch/train.py --data shards/ --output runs/first

The cheap checks come first, so that a user's mistake shows within seconds on every rank; then the ranks join, agree on what
to resume from, build the engine and train. Exit codes: 0 finished or stopped cleanly, 2 a mistake in the input, 17 a hang.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import UserError, as_user_error
from launch.cli import make_quiet, run_command
from launch.ranks import join
from launch.run.arguments import check_paths, parse_arguments
from launch.run.launcher_guard import guard_launcher
from launch.run.stop import StopRequest


def main() -> int:
    guard_launcher()  # it forks, so before any thread
    stop = StopRequest().install()  # before what takes seconds: a signal in the meantime ends it, or is kept
    # The tokens of an expert vary from step to step, and with them the sizes of its activations: growing segments do not fragment.
    # Where the user has set either of PyTorch's two names for it, that stays.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    join.raise_open_files()
    rank, world_size = join.set_environment()
    if rank and {"-h", "--help"} & set(sys.argv):
        return 0  # rank 0 prints it
    try:
        arguments = parse_arguments()
        stop.after(arguments.max_hours)
        check_paths(arguments)
        accelerator = os.environ.get("DS_ACCELERATOR")  # the user's choice: `make_quiet` makes one as well
        make_quiet()  # which loads torch for seconds: not before --help
        from launch.run.resolve import resolve_run
        from launch.toolchain import check_driver

        check_driver(accelerator)
        if arguments.deterministic:
            from launch.engine import determinism

            determinism.enable()
        run = resolve_run(arguments, world_size)
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
        if world_size == 1 or mistake is None:
            raise
        make_quiet()
        from launch.run.refuse import refuse_together

        refuse_together(mistake)
    from launch.run.session import run_session

    return run_session(arguments, run, stop)


if __name__ == "__main__":
    run_command(main)
