"""Benchmarks: each measures ours beside a peer on the same work in one run, and prints ratios.

python launch/benchmark.py moe|attention|loss|step|generate|growth|roofline|data|preprocess|learning|ladder|balance|all [options]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import UserError
from data.files import check_replaceable, replace_json
from data.flags import Parser
from launch.cli import make_quiet, run_command

EXAMPLES = """
python launch/benchmark.py step --help
python launch/benchmark.py moe --output moe.json
python launch/benchmark.py all --budget 10m --output all.json
"""

BENCHMARKS = {
    "attention": "attention with sinks, against eager attention and transformers' GPT-OSS and Glm4Moe",
    "loss": "fused cross entropy, against plain logits",
    "moe": "the mixture-of-experts layer, against transformers' Glm4Moe",
    "generate": "generated tokens per second after a cached prompt, against transformers' Glm4Moe with the same weights",
    "roofline": "bytes, kernels, waits and predicted MFU of a micro-step on a GPU, counted without having one",
    "step": "a training step, against Glm4Moe under stock AutoEP and both models without DeepSpeed",
    "growth": "time, bytes and memory per token, as the number of tokens and experts grows",
    "data": "packed samples, against HF datasets on the same tokens",
    "balance": "how much of the experts' uneven load comes from the tokens of a step, by tokens per step",
    "ladder": "train a family of small models, fit a scaling law, and predict the large ones",
    "learning": "train variants of a model alike and compare validation bits per byte at equal active FLOPs",
    "preprocess": "text to shards, against one reader and a pool of HF tokenizers",
    "all": "every benchmark that needs no input, within a time budget",
}


def main() -> int:
    about = "Measure this project against a peer on the same work in the same run, and print ratios."
    parser = Parser(prog="python launch/benchmark.py", description=about, examples=EXAMPLES)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    chosen = next((argument for argument in sys.argv[1:] if argument in BENCHMARKS), None)
    if chosen:
        make_quiet()
    for name, summary in BENCHMARKS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the flags of the others would load torch, DeepSpeed and datasets for nothing
            importlib.import_module(f"launch.benchmarks.{name}").add_arguments(sub)
        sub.add_argument("--output", type=Path, metavar="FILE", help="also write the figures there as JSON")
    arguments = parser.parse_args()
    for path in (arguments.output, getattr(arguments, "chart", None)):
        if path:
            check_replaceable(path)
    result = importlib.import_module(f"launch.benchmarks.{arguments.benchmark}").run(arguments)
    if arguments.output and os.environ.get("RANK", "0") == "0":
        replace_json(arguments.output, result)
    if failed := result.get("failed"):  # by name, why: the others' figures are written
        raise UserError("; ".join(failed.values()))
    return 0


if __name__ == "__main__":
    run_command(main)
