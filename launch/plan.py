"""Memory, time and cost of a training run before it is paid for; needs no GPU and no data.

python launch/plan.py --model 800m --gpu a100-80gb --num_gpus 8 --deepspeed_config ds_configs/ep8_zero2.json --tokens 131e9
"""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.terminal import write_out
from launch.cli import run_command
from launch.planning.arguments import parse_arguments


def main() -> int:
    arguments = parse_arguments()
    # After --help and the flags' own mistakes.
    if arguments.from_run:
        from launch.planning.past import rest_of, show_rest

        found, show_found = rest_of(arguments), show_rest
    else:
        from launch.planning.answer import answer
        from launch.planning.show import show

        found, show_found = answer(arguments), partial(show, with_curve=arguments.curve)
    text = json.dumps(found, indent=2) if arguments.json else show_found(found)
    with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
        write_out(text)
    return 0


if __name__ == "__main__":
    run_command(main)
