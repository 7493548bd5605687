"""Everything that one GPU can show of this system, in one command: `make gpu`.

    python tests/gpu/acceptance.py [--device cuda|cpu] [--model 800m] [--output tests/results/gpu.json]

The stations run the commands that a user types, one after the other, each in a process of its own and within a limit of time. One
that fails is reported and the next goes on. At the end there is a table, and a JSON with every figure. On a CPU
(`--device cpu --model tiny`) the same stations run with small sizes: that is how this file is tested, and its figures say nothing
about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what this script measures is its own clone's
from data.cli import UserError
from launch.toolchain import check_toolchain, unusable_gpu

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]


class StationFailed(Exception):
    """A command ended with another exit code than it should have; the message has the end of what it said."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all stations share: where things lie, what is trained, and for how long a command may run."""

    device: str
    model: str
    folder: Path
    steps: int
    length: int
    limit: float
    gpu: str | None = None  # by the driver's name
    memory: float = 0.0  # bytes of the GPU

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def environment(self) -> dict[str, str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        if not self.on_gpu:
            env.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        return env

    def call(self, name: str, *command: object, limit: float | None = None) -> str:
        """Run a command from the repository's root; what it said also lies in `logs/NAME.log`. Raises StationFailed."""
        self.logs.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, *map(str, command)]
        log = self.logs / f"{name}.log"
        seconds = limit or self.limit
        with open(log, "w+", encoding="utf-8", errors="replace") as file:
            print(f"$ {shlex.join(words)}", file=file, flush=True)
            # A session of its own, so that what the command started ends with it, and does not run beside the next measurement.
            process = subprocess.Popen(words, cwd=ROOT, env=self.environment(), stdout=file, stderr=file, start_new_session=True)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise StationFailed(f"longer than {seconds:.0f} s: {shlex.join(words[1:])} ({log})") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            file.seek(0)
            said = file.read().partition("\n")[2]
        if code:
            raise StationFailed(f"exit code {code}: {_last_words(said)} ({log})")
        return said

    def config(self, name: str, **changes: object) -> Path:
        """A DeepSpeed JSON for one rank, written into the folder: the repository's own, with `changes` to its top level."""
        source = "ep1_zero2.json" if self.on_gpu else "cpu_ep1_zero2.json"
        config = json.loads((ROOT / "ds_configs" / source).read_text(encoding="utf-8"))
        if self.on_gpu:  # two micro-batches a step, so that accumulation happens and a step takes no minute
            config.update(train_batch_size=2 * config["train_micro_batch_size_per_gpu"], gradient_accumulation_steps="auto")
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({**config, **changes}, indent=2), encoding="utf-8")
        return path

    def train(self, name: str, output: Path, config: Path, steps: int, *flags: object) -> list[dict[str, Any]]:
        """Train to `steps`; returns the rows of metrics.jsonl."""
        command = [
            "launch/train.py",
            "--data",
            self.shards,
            "--output",
            output,
            "--model",
            self.model,
            "--deepspeed_config",
            config,
        ]
        command += ["--sequence_length", self.length, "--max_steps", 2 * self.steps, "--stop_after", steps, "--log_interval", 1]
        command += ["--eval_interval", 0, "--save_interval", self.steps // 2, "--wandb", "disabled", *flags]
        self.call(name, *command)
        return rows(output)


def rows(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, the last row of each step (a resumed run may have logged one twice)."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return list({row["step"]: row for row in map(json.loads, lines) if "loss" in row}.values())


def copied(run: Path, output: Path) -> None:
    """A run to go on from, its checkpoints' files the same on the disk: one of `800m` has 11 GB, and nothing writes to it again."""

    def copy(source: str, target: str) -> None:
        (os.link if Path(source).parent.name.startswith("step_") else shutil.copy2)(source, target)

    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(run, output, copy_function=copy)


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "said nothing"


# The stations, in the order in which they need each other.


def kernels(site: Site) -> Figures:
    """Every kernel that is present against fp32 and float64 formulas, forward and backward; host waits are errors there."""
    mark, where = ("gpu", "tests/model") if site.on_gpu else ("not gpu and not slow", "tests/model/test_rope.py")
    return _tests(site, "kernels", mark, where)


def memory(site: Site) -> Figures:
    """The planner's memory beside what the allocator says of a few steps of `800m` cut to six layers, by mode of recomputation."""
    mark, where = ("gpu", "tests/launch") if site.on_gpu else ("not gpu and not slow", "tests/launch/planning/test_devices.py")
    return _tests(site, "memory", mark, where)


def _tests(site: Site, name: str, mark: str, where: str) -> Figures:
    """Verbose, so that the log of a station that ran out of time names the test; kernels compile for minutes the first time."""
    options = ("-v", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
    said = site.call(name, "-m", "pytest", *options, "-m", mark, where, limit=2.5 * site.limit)
    return {"pytest": _last_words(said)}


def data(site: Site) -> Figures:
    """The running Python's standard library, with a tokenizer of the model's vocabulary."""
    vocabulary = json.loads((ROOT / "model" / "presets" / f"{site.model}.json").read_text(encoding="utf-8"))["vocab_size"]
    shutil.rmtree(site.shards, ignore_errors=True)
    command = ["data/preprocess.py", "--input", "stdlib", "--output", site.shards, "--train_tokenizer", vocabulary]
    site.call("data", *command, "--validation_fraction", 0.02)
    manifest = json.loads((site.shards / "manifest.json").read_text(encoding="utf-8"))
    return {name: manifest["splits"]["train"][name] for name in ("documents", "tokens")}


def train(site: Site) -> Figures:
    """Steps of the model as it trains; throughput and MFU are the median of the second half."""
    shutil.rmtree(site.run, ignore_errors=True)
    logged = site.train("train", site.run, site.config("zero2"), site.steps)
    if not all(math.isfinite(row["loss"]) for row in logged) or logged[-1]["loss"] >= logged[0]["loss"]:
        raise StationFailed(f"the loss went from {logged[0]['loss']} to {logged[-1]['loss']}")
    late = logged[len(logged) // 2 :]
    figures = {"first_loss": logged[0]["loss"], "last_loss": logged[-1]["loss"], "steps": len(logged)}
    for name in ("tokens_per_second", "mfu", "memory_gb"):
        values = sorted(row[name] for row in late if row.get(name) is not None)
        if values:
            figures[name] = values[len(values) // 2]
    return figures


def plain(site: Site) -> Figures:
    """The first half again with `MOE_KERNELS=0`: how far our Triton kernels move the losses, and the speed."""
    with mock.patch.dict(os.environ, MOE_KERNELS="0"):
        pairs, apart = half_again(site, "plain")
    if not apart <= (1e-2 if site.on_gpu else 0):
        raise StationFailed(f"losses with our kernels differ by {apart:.2e} of themselves from those of plain PyTorch")
    without, with_ours = speeds(pairs)
    return {"largest_relative_difference": apart, "speed_of_ours_to_plain": with_ours / without}


def half_again(site: Site, name: str, *flags: object) -> tuple[list[tuple[Figures, Figures]], float]:
    """The first half in a run of its own: its rows, each with the first run's, and their losses' largest relative difference."""
    output = site.folder / name
    shutil.rmtree(output, ignore_errors=True)
    logged = site.train(name, output, site.config("zero2"), site.steps // 2, *flags)
    first = {row["step"]: row for row in rows(site.run)}
    pairs = [(row, first[row["step"]]) for row in logged]
    shutil.rmtree(output / "checkpoints")
    return pairs, largest(abs(again["loss"] - before["loss"]) / again["loss"] for again, before in pairs)


def largest(differences: Iterable[float]) -> float:
    """NaN where one of them is: Python's own maximum passes over it."""
    return float(np.max(list(differences)))


def speeds(pairs: list[tuple[Figures, Figures]]) -> tuple[float, float]:
    """Median tokens a second, of what was run again and of the first run."""
    again, before = (
        median(row["tokens_per_second"] for row in some if row.get("tokens_per_second")) for some in zip(*pairs, strict=True)
    )
    return again, before


def resume(site: Site) -> Figures:
    """The second half again from the checkpoint in the middle."""
    apart = second_half_again(site, "resume", site.run, bound=1e-2 if site.on_gpu else 0)
    return {"largest_relative_difference": apart, "bit_equal": apart == 0}


def deterministic(site: Site) -> Figures:
    """The run again with `--deterministic`, and the second half of that from its middle: equal to the bit."""
    flag, run = "--deterministic", site.folder / "deterministic"
    shutil.rmtree(run, ignore_errors=True)
    try:
        logged = site.train("deterministic", run, site.config("zero2"), site.steps, flag)
        second_half_again(site, "deterministic_resume", run, flag, bound=0)
    finally:
        for left in (run / "checkpoints", site.folder / "resumed"):
            shutil.rmtree(left, ignore_errors=True)
    with_it, without = speeds(list(zip(logged, rows(site.run), strict=True))[len(logged) // 2 :])
    return {"speed_to_not_deterministic": with_it / without}


def second_half_again(site: Site, name: str, run: Path, *flags: object, bound: float) -> float:
    """The losses' largest relative difference to those of `run`, which must be within the bound."""
    copy = site.folder / "resumed"
    before = {row["step"]: row["loss"] for row in rows(run)}
    middle = site.steps // 2
    copied(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{site.steps}")
    (copy / "checkpoints" / "latest").write_text(f"step_{middle}", encoding="utf-8")
    after = {row["step"]: row["loss"] for row in site.train(name, copy, site.config("zero2"), site.steps, *flags)}
    apart = largest(abs(after[step] - before[step]) / abs(before[step]) for step in before if step > middle)
    if not apart <= bound:
        how = " ".join(["resuming", *(f"with {flag}" for flag in flags)])
        raise StationFailed(f"losses after {how} differ by {apart:.2e} of themselves")
    shutil.rmtree(copy)
    return apart


def convert(site: Site) -> Figures:
    """The last checkpoint under ZeRO 1, then 3, two steps each: a conversion with fused Adam's own `step` on the device."""
    base, figures = site.folder / "converted", {}
    copied(site.run, base)
    zero = json.loads(site.config("zero2").read_text(encoding="utf-8"))["zero_optimization"]
    extra = 0
    for stage in (1, 3):
        extra += 2
        config = site.config(f"zero{stage}", zero_optimization={**zero, "stage": stage})
        logged = site.train(f"convert_zero{stage}", base, config, site.steps + extra)
        figures[f"loss_after_zero{stage}"] = logged[-1]["loss"]
    if not all(math.isfinite(loss) for loss in figures.values()):
        raise StationFailed(f"losses after the conversions: {figures}")
    shutil.rmtree(base)
    return figures


def export(site: Site) -> Figures:
    """A Hugging Face folder, a generation, and bits per byte on the validation split."""
    hf = site.folder / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    site.call("export", "launch/export.py", "--checkpoint", site.run, "--output", hf)
    said = site.call("generate", "launch/generate.py", "--model", hf, "--prompt", "def add(a, b):\n", "--max_new_tokens", 16)
    result = site.folder / "evaluation.json"
    site.call("evaluate", "launch/evaluate.py", "--model", hf, "--data", site.shards, "--sequence_length", 256, "--output", result)
    evaluation = json.loads(result.read_text(encoding="utf-8"))
    return {"generated_characters": len(said), **{k: v for k, v in evaluation.items() if isinstance(v, int | float)}}


def compiled(site: Site) -> Figures:
    """The first half again with `--compile`: how far that moves the losses, and the speed once all is compiled."""
    pairs, apart = half_again(site, "compiled", "--compile")
    if not apart <= 1e-2:
        raise StationFailed(f"losses with --compile differ by {apart:.2e} of themselves from those without")
    with_it, without = speeds(pairs[len(pairs) // 2 :])
    return {"largest_relative_difference": apart, "speed_to_not_compiled": with_it / without}


def profiled(site: Site) -> Figures:
    """Where a step goes: milliseconds by part of two traced steps, which add up to the step."""
    output = site.folder / "profiled"
    shutil.rmtree(output, ignore_errors=True)
    site.train("profile", output, site.config("zero2"), PROFILED, "--profile", 2)
    table = json.loads((output / "profile" / "table.json").read_text(encoding="utf-8"))
    parts = dict(sorted(table["ms"].items(), key=lambda pair: -pair[1]))
    if abs(sum(parts.values()) / table["ms_of_a_step"] - 1) > 0.1:
        raise StationFailed(f"the parts add up to {sum(parts.values()):.1f} ms of a step of {table['ms_of_a_step']:.1f} ms")
    shutil.rmtree(output / "checkpoints")
    return {**{f"{part}_ms": ms for part, ms in parts.items()}, "ms_of_a_step": table["ms_of_a_step"]}


def roofline(site: Site) -> Figures:
    """What is predicted of one micro-step on this card, by what limits it; beside the measured MFU where training has one."""
    output = site.folder / "roofline.json"
    what = ("--model", site.model, "--sequence_length", site.length, "--deepspeed_config", site.config("zero2"))
    where = ("--gpu", site.gpu) if site.gpu else ()
    site.call("roofline", "launch/benchmark.py", "roofline", *what, *where, "--output", output)
    found = json.loads(output.read_text(encoding="utf-8"))
    ours = found["ours"]
    figures = {
        "predicted_mfu": ours["whole_step"]["mfu"],
        "kernels_mfu": ours["mfu"],
        **{f"{k}_s": v for k, v in ours["limits"].items()},
    }
    measured = sorted(row["mfu"] for row in rows(site.run) if row.get("mfu")) if (site.run / "metrics.jsonl").exists() else []
    if measured:
        figures["measured_to_predicted_mfu"] = measured[len(measured) // 2] / figures["predicted_mfu"]
    return {**figures, "contestants": {name: row for name, row in found.items() if isinstance(row, dict) and "mfu" in row}}


def benchmark(name: str, gpu: Iterable[object], cpu: Iterable[object]) -> Callable[[Site], Figures]:
    def station(site: Site) -> Figures:
        output = site.folder / f"{name}.json"
        site.call(f"benchmark_{name}", "launch/benchmark.py", name, *(gpu if site.on_gpu else cpu), "--output", output)
        return dict(json.loads(output.read_text(encoding="utf-8")))

    station.__doc__ = f"`launch/benchmark.py {name}`: ours beside its peers."
    return station


#: For `benchmark.py step`, by the least bytes of a GPU on which all contestants fit together with room to spare.
STEP_SIZES = (
    (70e9, ("--model", "800m", "--layers", 4, "--micro_batch", 4, "--sequence_length", 2048)),
    (40e9, ("--model", "800m", "--layers", 2, "--micro_batch", 1, "--sequence_length", 2048)),
    (22e9, ("--model", "60m", "--micro_batch", 2, "--sequence_length", 2048)),
    (0, ("--model", "tiny", "--micro_batch", 4, "--sequence_length", 1024)),
)


def step(site: Site) -> Figures:
    """`launch/benchmark.py step`: ours beside its peers, all of which share the GPU."""
    size = next(flags for least, flags in STEP_SIZES if site.memory >= least)
    small = ("--model", "tiny", "--sequence_length", 64, "--micro_batch", 2, "--steps", 1)
    return benchmark("step", (*size, "--deepspeed_config", "ds_configs/ep1_zero2.json"), small)(site)


STATIONS: dict[str, Callable[[Site], Figures]] = {
    "kernels": kernels,
    "data": data,
    "train": train,
    "plain": plain,
    "resume": resume,
    "convert": convert,
    "export": export,
    "compiled": compiled,
    "deterministic": deterministic,
    "profiled": profiled,
    "attention": benchmark("attention", (), ("--device", "cpu", "--length", 128, "--repeats", 1)),
    "loss": benchmark("loss", (), ("--device", "cpu", "--tokens", 512, "--hidden", 64, "--vocabulary", 2048, "--repeats", 1)),
    "moe": benchmark("moe", (), ("--device", "cpu", "--model", "tiny", "--tokens", 256, "--repeats", 1)),
    "step": step,
    "growth": benchmark(
        "growth",
        (),
        ("--sequence_length", 64, "--tokens", 128, 256, "--experts", 1, 2, "--vocabulary", 512, "--repeats", 1),
    ),
    "memory": memory,
    "roofline": roofline,
}
#: What a station needs of those before it.
NEEDS = {"train": ("data",), "plain": ("train",), "resume": ("train",), "convert": ("train",), "export": ("train",)}
NEEDS |= {"compiled": ("train",), "deterministic": ("train",), "profiled": ("data",)}
#: Steps of a run that is profiled: those that are not traced first (launch/run/profile.py), and two.
PROFILED = 6


def run(site: Site, names: list[str], deadline: float) -> dict[str, Figures]:
    """Each station's figures, with `ok`, `seconds` and, where it failed or was left out, `reason`."""
    results: dict[str, Figures] = {}
    for name in names:
        missing = [need for need in NEEDS.get(name, ()) if need in names and not results[need]["ok"]]
        began = time.monotonic()
        if missing:
            result: Figures = {"ok": False, "reason": f"left out, {missing[0]} failed"}
        elif began > deadline:
            result = {"ok": False, "reason": "left out, no time left (--minutes)"}
        else:
            result = _attempt(STATIONS[name], site)
        results[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
        print(_row(name, results[name]), flush=True)
    return results


def _attempt(station: Callable[[Site], Figures], site: Site) -> Figures:
    try:
        return {"ok": True, **station(site)}
    except Exception as error:  # whatever it is: the other stations must still be heard
        return {"ok": False, "reason": f"{type(error).__name__}: {error}"}


def _row(name: str, result: Figures) -> str:
    shown = {k: v for k, v in result.items() if k not in ("ok", "seconds", "reason") and isinstance(v, int | float | str)}
    words = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return f"{name:<10} {'ok' if result['ok'] else 'FAILED':<7} {result['seconds']:>7.1f} s  {result.get('reason', words)}"


def facts(site: Site) -> Figures:
    """Machine and versions, as far as they can be had without failing."""
    code = "import json, torch; gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None; "
    code += "print(json.dumps([torch.__version__, gpu and gpu.name, gpu and gpu.total_memory]))"
    done = subprocess.run([sys.executable, "-c", code], env=site.environment(), capture_output=True, text=True, check=True)
    torch_version, gpu, memory = json.loads(done.stdout.splitlines()[-1])
    return {
        "gpu": gpu,
        "gpu_memory": memory,
        "machine": platform.machine(),
        "torch": torch_version,
        "python": platform.python_version(),
    }


def lacking(machine: Figures) -> str | None:
    """What keeps PyTorch and Triton from this machine's GPU, in training's own words."""
    if machine["gpu"] is None:
        why = unusable_gpu() or "make gpu needs a CUDA device and PyTorch sees none"
        return f"{why}; on a CPU: --device cpu --model tiny"
    try:
        check_toolchain("cuda")
    except UserError as error:
        return str(error)
    return None


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # what a station has started ends with it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="800m", help="a preset (default: 800m)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens of a sample (default: 2048)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="where shards, runs and logs go (default: runs/gpu)")
    parser.add_argument(
        "--output", type=Path, default=Path("tests/results/gpu.json"), help="the figures (default: tests/results/gpu.json)"
    )
    parser.add_argument("--only", nargs="+", choices=STATIONS, help="these stations alone")
    parser.add_argument("--minutes", type=float, default=15.0, help="no station starts after this time (default: 15)")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that one command may take (default: 240)")
    arguments = parser.parse_args()
    site = Site(
        device=arguments.device,
        model=arguments.model,
        folder=arguments.folder.resolve(),
        steps=arguments.steps,
        length=arguments.sequence_length,
        limit=arguments.limit,
    )
    site.folder.mkdir(parents=True, exist_ok=True)
    machine = facts(site)
    if site.on_gpu and (said := lacking(machine)):
        print(f"error: {said}", file=sys.stderr)
        return 2
    if site.on_gpu:
        site = replace(site, gpu=machine["gpu"], memory=machine["gpu_memory"])
    print(" ".join(f"{k} {v}" for k, v in machine.items()), flush=True)
    results = run(site, arguments.only or list(STATIONS), time.monotonic() + 60 * arguments.minutes)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine, "stations": results}, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, result in results.items() if not result["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} stations passed; figures in {arguments.output}, logs in {site.logs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
