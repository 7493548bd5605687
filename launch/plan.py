"""Memory, time and cost of a training run before it is paid for; needs no GPU and no data.

python launch/plan.py --model 800m --gpu a100-80gb --num_gpus 8 --deepspeed_config ds_configs/ep8_zero2.json --tokens 131e9
"""

from __future__ import annotations

import contextlib
import json

import launch  # noqa: F401 - first: it names what hides our packages
from launch.cli import run_command
from launch.planning.arguments import parse_arguments


def main() -> int:
    arguments = parse_arguments()
    # After --help and the flags' own mistakes.
    from launch.planning.answer import answer
    from launch.planning.past import rest_of, show_rest
    from launch.planning.show import show

    found = rest_of(arguments) if arguments.from_run else answer(arguments)
    if arguments.json:
        text = json.dumps(found, indent=2)
    else:
        text = show_rest(found) if arguments.from_run else show(found, with_curve=arguments.curve)
    with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
