"""Benchmarks: each measures ours beside a peer on the same work in one run, and prints ratios.

python launch/benchmark.py moe|attention|loss|step|data|preprocess [options]
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from launch.errors import make_quiet, run_command

BENCHMARKS = {
    "attention": "attention with sinks: ours against eager and transformers' GPT-OSS and Glm4Moe",
    "loss": "fused cross entropy against plain logits",
    "moe": "the mixture-of-experts layer against transformers' Glm4Moe",
    "step": "a training step under DeepSpeed against transformers' Glm4Moe under stock AutoEP",
    "data": "packed samples against HF datasets on the same tokens",
    "preprocess": "text to shards against one reader and a pool of HF tokenizers",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python launch/benchmark.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, summary in BENCHMARKS.items():
        sub = commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        importlib.import_module(f"launch.benchmarks.{name}").add_arguments(sub)
        sub.add_argument("--output", type=Path, help="also write the figures there as JSON")
    arguments = parser.parse_args()
    make_quiet()
    result = importlib.import_module(f"launch.benchmarks.{arguments.benchmark}").run(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
