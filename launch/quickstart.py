"""The whole line on this machine's own Python: `make quickstart`.

Runs the README's commands one after the other, each shown before it runs, on the standard library of the running Python. What
an earlier quickstart finished is not done again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import Exit, UserError
from data.flags import Parser, at_least_one
from launch.cli import CLONE, check_docstrings, run_command
from launch.ranks.spawn import free_port

PROMPT = "def read_lines(path):\n"


def commands(folder: Path, steps: int) -> list[tuple[str, list[str]]]:
    """(what it does, the command) of each station."""
    python, shards, run, hf = sys.executable, folder / "shards", folder / "run", folder / "hf"
    length = ["--sequence_length", "256"]
    preprocess = ["data/preprocess.py", "--input", "stdlib", "--train_tokenizer", "4096", "--validation_fraction", "0.02"]
    train = ["launch/train.py", "--data", shards, "--output", run, "--model", "tiny", *length]
    dtype, strategy = precision()
    train += ["--deepspeed_config", strategy, "--max_steps", steps, "--eval_interval", max(1, steps // 4)]
    train += ["--eval_batches", "4", "--save_interval", max(1, steps // 2), "--log_interval", "10"]
    launcher = ["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", free_port()]
    stations = [
        ("Text to shards: the standard library, with a tokenizer trained on it", [python, *preprocess, "--output", shards]),
        (f"Training on two ranks: expert parallel, ZeRO-2, {dtype}", [*launcher, *train]),
        ("Export: one folder for transformers", [python, "launch/export.py", "--checkpoint", run, "--output", hf]),
        (
            "Evaluation on the validation split",
            [python, "launch/evaluate.py", "--model", hf, "--data", shards, "--output", folder / "evaluation.json", *length],
        ),
        (
            "A page about the run, for a browser",
            [python, "launch/report.py", run, "--evaluation", folder / "evaluation.json", "--output", folder / "report.html"],
        ),
        (
            "A function, written by the model",
            [python, "launch/generate.py", "--model", hf, "--prompt", PROMPT, "--max_new_tokens", "96", "--temperature", "0.5"],
        ),
    ]
    return [(title, [str(part) for part in command]) for title, command in stations]


def precision() -> tuple[str, Path]:
    """bf16, or fp32 where this CPU is slow at bf16, and its strategy."""
    from launch.toolchain import cpu_multiplies_bf16  # torch, which `--help` does without

    folder = Path("ds_configs")
    return ("bf16", folder / "cpu_ep2_zero2.json") if cpu_multiplies_bf16() else ("fp32", folder / "cpu_ep2_zero2_fp32.json")


def shown(command: list[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def preparation() -> str:
    """What a person types before the commands that are shown, so that they find the files and this Python."""
    own, found = Path(sys.executable), shutil.which("python")
    go = f"cd {shlex.quote(str(CLONE))}"
    # An environment's Python is a link to one that has no packages: the folder decides too.
    if found and Path(found).parent.samefile(own.parent) and Path(found).samefile(own):
        return go
    activate = own.parent / "activate"
    if not activate.is_file():
        return f"{go} && export PATH={shlex.quote(str(own.parent))}:$PATH"
    return f"{go} && source {shlex.quote(str(activate.relative_to(CLONE) if activate.is_relative_to(CLONE) else activate))}"


def again() -> str:
    """The command that goes on from here."""
    by_make = len(sys.argv) == 1 and Path(sys.executable).parent == CLONE / ".venv" / "bin"
    return "make quickstart" if by_make else shlex.join(sys.orig_argv)


def environment() -> dict[str, str]:
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores
    env.setdefault("DS_ACCELERATOR", "cpu")  # the quickstart is the same on every machine
    env.setdefault("CUDA_VISIBLE_DEVICES", "")
    return env


def main() -> int:
    parser = Parser(
        prog="python launch/quickstart.py",
        description="Run everything from text to a model that generates, on this Python's own standard library.",
        examples="make quickstart\npython launch/quickstart.py --steps 50 --folder /tmp/quickstart",
    )
    where = "where everything goes (default: runs/quickstart in the clone)"
    parser.add_argument("--folder", type=Path, metavar="DIR", help=where)
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="optimizer steps of 4,096 tokens")
    arguments = parser.parse_args()
    at_least_one(arguments, "steps")
    check_docstrings()  # before the first station, which needs none
    folder = Path("runs/quickstart") if arguments.folder is None else from_root(arguments.folder)
    os.chdir(CLONE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be made: {error.strerror}; name another") from error
    return run(folder, arguments.steps)


def from_root(folder: Path) -> Path:
    """What was meant where the command was started, as the stations find it, which run in the clone."""
    return folder if folder.is_absolute() else Path(os.path.relpath(folder, CLONE))


def run(folder: Path, steps: int) -> int:
    """Every station in turn, then what there is now; the exit code of the first that fails."""
    began = time.monotonic()
    stations = commands(folder, steps)
    for number, (title, command) in enumerate(stations, 1):
        print(f"\n[{number}/{len(stations)}] {title}\n$ {shown(command)}", flush=True)
        try:
            code = subprocess.run(command, env=environment(), check=False).returncode
        except KeyboardInterrupt:
            print(f"\ninterrupted; `{again()}` goes on from here", file=sys.stderr)
            return Exit.INTERRUPTED
        if code:
            print(f"\nstation {number} failed (exit code {code}); `{again()}` goes on from here", file=sys.stderr)
            return code
    minutes = (time.monotonic() - began) / 60
    print(f"""
Done in {minutes:.1f} minutes. {folder}/ now holds shards/ (the tokens and the tokenizer), run/ (checkpoints, metrics.jsonl,
W&B offline curves), hf/ (the model as a Hugging Face folder), evaluation.json and report.html, which a browser opens. Ask the
model for more:
    {preparation()}
    {shown([*stations[-1][1][:4], "--prompt", "class Stack:"])}
and train the 800M model on your own code and GPUs:
    python data/preprocess.py --input 'corpus/*.json.gz' --tokenizer bigcode/starcoder2-15b --output shards/
    python launch/plan.py --model 800m --gpu a100-80gb --num_gpus 8 --tokens 14.5e9     # days, memory, --max_steps
    deepspeed --num_gpus 8 launch/train.py --data shards/ --output runs/first --max_steps 27657 --save_interval 1000""")
    return 0


if __name__ == "__main__":
    run_command(main)
