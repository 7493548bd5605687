"""Judge a model: loss and bits per byte on validation splits, pass@k by running what it writes in a sandbox.

python launch/evaluate.py --model hf/ --data shards/ --output evaluation.json
python launch/evaluate.py --model hf/ --humaneval HumanEval.jsonl.gz --samples 20 --allow_code_execution --output e.json
python launch/evaluate.py --score samples.jsonl --humaneval HumanEval.jsonl.gz --allow_code_execution --output e.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import make_quiet, run_command
from launch.evaluation.arguments import parse_arguments


def main() -> int:
    arguments = parse_arguments()
    make_quiet()
    from launch.evaluation.command import evaluate

    evaluate(arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
