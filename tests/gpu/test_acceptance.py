"""`make gpu` as far as a CPU goes: the same stations, one that fails among them, and what is said where there is no GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ROOT

from launch.benchmarks import step as benchmark
from launch.engine import strategy
from model.config_json import load_sizes

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import acceptance
import bundle

SCRIPT = ROOT / "tests" / "gpu" / "acceptance.py"


def site(folder: Path, **changes: object) -> acceptance.Site:
    values = {"device": "cpu", "model": "tiny", "folder": folder, "steps": 4, "length": 64, "limit": 60.0, **changes}
    return acceptance.Site(**values)


def test_a_station_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(here: acceptance.Site) -> acceptance.Figures:
        here.call("broken", "-c", "import sys; print('the reason'); sys.exit(3)")
        return {}

    def sound(here: acceptance.Site) -> acceptance.Figures:
        return {"said": here.call("sound", "-c", "print(6 * 7)").strip()}

    monkeypatch.setattr(acceptance, "STATIONS", {"data": broken, "train": sound, "loss": sound})
    results = acceptance.run(site(tmp_path), ["data", "train", "loss"], time.monotonic() + 60)
    assert "exit code 3: the reason" in results["data"]["reason"]
    assert results["train"]["reason"] == "left out, data failed"
    assert results["loss"]["ok"] and results["loss"]["said"] == "42"
    assert (tmp_path / "logs" / "broken.log").read_text().endswith("the reason\n")
    assert "FAILED" in capsys.readouterr().out


def test_a_command_that_hangs_ends_at_its_limit(tmp_path: Path) -> None:
    with pytest.raises(acceptance.StationFailed, match="longer than 1 s"):
        site(tmp_path, limit=1.0).call("hang", "-c", "import time; time.sleep(60)")


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    """Kernels are compiled by processes below pytest; they ran on beside the next measurement."""
    start = "import subprocess, time; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); time.sleep(60)"
    with pytest.raises(acceptance.StationFailed):
        site(tmp_path, limit=3.0).call("parent", "-c", start)
    child = Path("/proc") / (tmp_path / "logs" / "parent.log").read_text().split()[-1]
    until = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # nobody waits for it: it goes, or stays a zombie
        while "(zombie)" not in (child / "status").read_text():
            assert time.monotonic() < until
            time.sleep(0.1)


def test_no_station_starts_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "STATIONS", {"loss": lambda _: pytest.fail("started")})
    assert "no time left" in acceptance.run(site(tmp_path), ["loss"], time.monotonic() - 1)["loss"]["reason"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--output", str(tmp_path / "gpu.json")]
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr and "--device cpu" in done.stderr


def test_why_pytorch_sees_no_gpu_is_said_before_any_station(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(acceptance, "unusable_gpu", lambda: "driver 535.183.01 is too old; update it")
    assert acceptance.lacking({"gpu": None}) == "driver 535.183.01 is too old; update it; on a CPU: --device cpu --model tiny"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert str(acceptance.lacking({"gpu": "NVIDIA H200"})).startswith(
        "on a GPU kernels are compiled, and this host lacks a C compiler"
    )


def test_a_resume_with_the_flag_must_be_equal_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: without it the last bits may differ."""
    trained: dict[str, tuple[object, ...]] = {}
    apart = {"resume": 1e-3, "deterministic_resume": 0.0}

    def train(self: acceptance.Site, name: str, output: Path, config: Path, steps: int, *flags: object) -> list[dict]:
        trained[name] = flags
        if "resume" in name:
            assert (output / "checkpoints" / "latest").read_text() == "step_2"
        losses = {step: 5.0 + (apart.get(name, 0.0) if step > 2 else 0.0) for step in range(1, steps + 1)}
        logged = [{"step": step, "loss": loss, "tokens_per_second": 10} for step, loss in losses.items()]
        for step in (2, 4):
            (output / "checkpoints" / f"step_{step}").mkdir(parents=True, exist_ok=True)
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
        return logged

    monkeypatch.setattr(acceptance.Site, "train", train)
    here = site(tmp_path, device="cuda")
    here.train("train", here.run, tmp_path, 4)
    assert acceptance.resume(here) == {"largest_relative_difference": pytest.approx(2e-4), "bit_equal": False}
    assert acceptance.deterministic(here) == {"speed_to_not_deterministic": 1.0}
    flag = ("--deterministic",)
    assert trained == {"train": (), "resume": (), "deterministic": flag, "deterministic_resume": flag}
    apart["deterministic_resume"] = 1e-9
    with pytest.raises(acceptance.StationFailed, match=r"after resuming with --deterministic differ by 2\.00e-10"):
        acceptance.deterministic(here)
    assert not (tmp_path / "deterministic" / "checkpoints").exists() and not (tmp_path / "resumed").exists()


@pytest.mark.parametrize("least", [row[0] for row in acceptance.STEP_SIZES])
def test_the_contestants_of_a_step_fit_onto_the_card_together(
    least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `800m` in full they took some 207 GB, on every card. A fifth of it is left for what is not counted."""
    called: list[list[object]] = []

    def call(self: acceptance.Site, name: str, *command: object) -> str:
        called.append(list(command))
        (self.folder / "step.json").write_text("{}")
        return ""

    monkeypatch.setattr(acceptance.Site, "call", call)
    memory = least or 16e9
    acceptance.STATIONS["step"](site(tmp_path, device="cuda", memory=memory))
    given = [str(word) for word in called[0][2:]]
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    benchmark.add_arguments(parser)
    arguments = parser.parse_args(given)
    sizes = load_sizes(arguments.model)
    path, settings = arguments.deepspeed_config, strategy.read_config(ROOT / arguments.deepspeed_config)
    settings.update(train_batch_size="auto", train_micro_batch_size_per_gpu=arguments.micro_batch, gradient_accumulation_steps=1)
    settings = strategy.resolve_config(settings, path, world_size=1, num_experts=sizes.n_routed_experts, max_steps=10)
    config = SimpleNamespace(to_dict=lambda: asdict(sizes))
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    job = benchmark.job_of(SimpleNamespace(config=config, settings=settings, mode="none"), 1, arguments, **changes)
    assert benchmark.together(["ours", "stock", "stock with knobs", "ours without DeepSpeed", "Glm4Moe"], job) < 0.86 * memory


@pytest.mark.slow
def test_every_station_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", "tiny", "--steps", "6", "--sequence_length", "64"]
    command += ["--folder", str(tmp_path / "site"), "--output", str(output), "--minutes", "60", "--limit", "900"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    stations = json.loads(output.read_text())["stations"]
    assert done.returncode == 0, done.stdout
    assert set(stations) == set(acceptance.STATIONS) and stations["resume"]["bit_equal"]


def test_a_run_is_copied_without_its_checkpoints_bytes(tmp_path: Path) -> None:
    """All copies of `800m`'s together took some 150 GB."""
    step = tmp_path / "run" / "checkpoints" / "step_4"
    step.mkdir(parents=True)
    (step / "weights.pt").write_bytes(b"w")
    for path in (step.parent / "latest", tmp_path / "run" / "metrics.jsonl"):
        path.write_text("before")
    acceptance.copied(tmp_path / "run", tmp_path / "copy")
    copy = tmp_path / "copy" / "checkpoints"
    assert (copy / "step_4" / "weights.pt").samefile(step / "weights.pt")
    assert not (copy / "latest").samefile(step.parent / "latest")
    assert not (tmp_path / "copy" / "metrics.jsonl").samefile(tmp_path / "run" / "metrics.jsonl")


def test_the_bundle_has_what_deepspeed_imports() -> None:
    """It lacked two packages, without which `import deepspeed` ends; the last two only serve kernels that are compiled."""
    machine = {"torch", "numpy", "packaging", "psutil", "tqdm"}  # its own, or come with its torch and transformers
    wanted = {re.split(r"[^\w.-]", line)[0] for line in requires("deepspeed") or () if "extra ==" not in line}
    assert wanted - machine - {"ninja", "py-cpuinfo"} <= {*bundle.WHEELS, *bundle.PURE}
