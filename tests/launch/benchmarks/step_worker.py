"""One rank: the contestants of `benchmark.py step` on a small model, and what three steps of training make of each."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from launch.benchmarks import contestant_processes, step
from launch.benchmarks.contestants import CONTESTANTS, Stage


def measure(model: str, out: str) -> None:
    contestant_processes.START = "fork"  # nothing has been started yet, and five imports are saved
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    sizes = ["--model", model, "--sequence_length", "32", "--micro_batch", "2", "--accumulation", "2", "--steps", "2"]
    arguments = parser.parse_args([*sizes, "--activation_checkpointing", "full"])
    result = step.run(arguments)
    stage, losses = Stage(arguments), {}
    stage.settings.pop("scheduler")
    for name in ("ours", "ours without DeepSpeed"):
        contestant, generator = CONTESTANTS[name](stage, name), torch.Generator().manual_seed(0)
        losses[name] = []
        for _ in range(4):
            for last in (False, True):
                loss = contestant.forward(torch.randint(0, 512, (2, 33), generator=generator) // 3)
                contestant.backward(loss, last=last)
                losses[name].append(float(loss))
            contestant.update()
    Path(out).write_text(json.dumps({"result": result, "losses": losses}))


if __name__ == "__main__":
    measure(*sys.argv[1:])
