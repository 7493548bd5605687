"""Runs for the fault tests: a small model, twelve steps, and the comparison with a run that nothing happened to."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nursery import ROOT, Nursery, Ranks
from support import metrics

from launch import manifest

TRAIN = str(ROOT / "launch" / "train.py")
PAUSING = str(ROOT / "tests" / "faults" / "pausing.py")  # the same, stopped at a place
STEPS, EVALUATE_EVERY, SAVE_EVERY = 12, 6, 4
#: What a clock or chance decides; everything else must be the same to the bit.
INCIDENTAL = ("tokens_per_second", "save_seconds", "mfu", "time", "memory_gb", "step_seconds", "data_seconds")
SAVING = {"save_seconds", "save_failed", "resumed"}


def deepspeed_json(ranks: int, **changes: Any) -> dict[str, Any]:
    """bf16, ZeRO-2, EP over all ranks, two accumulation steps, every block recomputed."""
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.01, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
        },
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 20000, "allgather_bucket_size": 20000},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ranks,
            "preset_model": "deepseek_v3",
            "use_grouped_mm": False,
        },
        "activation_checkpointing": {"mode": "full"},
        **changes,
    }


#: What struck in the test that runs, and how many bytes were lost: its report takes it to the table at the end.
TALLY: list[tuple[str, int]] = []


def struck(fault: str, lost: int = 0) -> None:
    """Count a fault for the table at the end; `lost`: bytes of the newest checkpoint that are not as they were written."""
    TALLY.append((fault, lost))


@dataclass(kw_only=True)
class Site:
    """Where runs are made: shards, model, DeepSpeed JSON, and a folder for their outputs."""

    nursery: Nursery
    shards: Path
    model: Path
    folder: Path
    ranks: int = 2
    starts: int = 0
    seconds: float = 0.0  # that the undisturbed run took

    def flags(self, output: Path, **changes: Any) -> list[str]:
        """The command line of `launch/train.py`; a value of None takes a flag away."""
        config = self.folder / f"ds_{self.ranks}.json"
        if not config.exists():
            config.write_text(json.dumps(deepspeed_json(self.ranks)))
        flags: dict[str, Any] = {
            "data": self.shards, "model": self.model, "output": output, "deepspeed_config": config, "sequence_length": 32,
            "max_steps": STEPS, "log_interval": 1, "eval_interval": EVALUATE_EVERY, "eval_batches": 2, "save_interval": SAVE_EVERY,
            "stall_timeout": 20, "wandb": "disabled", **changes,
        }  # fmt: skip
        return [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]

    def start(
        self,
        output: Path,
        *,
        pause_at: str = "",
        env: dict[str, str] | None = None,
        script: str = TRAIN,
        extra: Sequence[str] = (),
        **changes: Any,
    ) -> Ranks:
        """Start a run, or go on with it; the log of each start is a file of its own."""
        if pause_at:
            script, env = (PAUSING if script == TRAIN else script), {**(env or {}), "PAUSE_AT": pause_at}
        self.starts += 1
        log = self.folder / f"{self.starts}.log"
        return self.nursery.start(self.ranks, script, *self.flags(output, **changes), *extra, log=log, env=env)

    def finish(self, output: Path, **changes: Any) -> Ranks:
        """Start or go on, and train to the end."""
        ranks = self.start(output, **changes)
        assert ranks.wait() == [0] * self.ranks, ranks.text()[-6000:]
        return ranks


def strike(site: Site, output: Path, at: str, number: int, ranks: list[int] | None = None, **changes: Any) -> Ranks:
    """Start or go on; when the rank that `at` (RANK/STEP/PHASE) begins with comes there, send the signal to `ranks` (None: to
    all), and let it go on. Returns when all have ended; that the fault struck where it should is in the log."""
    running = site.start(output, pause_at=at, **changes)
    paused, step, phase = at.split("/", 2)
    running.until_paused(int(paused), f" at step {step}, {phase}")
    running.signal(number, ranks)
    running.signal(signal.SIGCONT, [int(paused)])
    running.wait()
    struck(f"{signal.Signals(number).name} to {'all ranks' if ranks is None else 'one rank'}", lost_bytes(output))
    return running


def lost_bytes(run: Path) -> int:
    """Bytes of the checkpoint that `latest` names which are not as they were written."""
    if not (run / "checkpoints" / "latest").exists():
        return 0
    folder = run / "checkpoints" / last_saved(run)
    files = manifest.read_manifest(folder)["files"]
    damaged = [name for name in files if manifest.first_damage(folder, {name: files[name]}, [name])]
    return sum(files[name]["bytes"] for name in damaged)


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides, and without the rows about saving."""
    return [{k: v for k, v in row.items() if k not in INCIDENTAL} for row in metrics(run) if not row.keys() & SAVING]


def last_saved(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def content(run: Path) -> dict[str, Any]:
    """Checksums of the newest checkpoint's files, and its state.json without what chance decides."""
    folder = run / "checkpoints" / last_saved(run)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    state = json.loads((folder / "state.json").read_text())
    state["extra"].pop("wandb_id")
    sums = {name: record["xxh3_128"] for name, record in files.items() if name != "state.json"}
    return {**sums, "state.json": state}


def assert_same(run: Path, whole: Path) -> None:
    """`run`, whatever happened to it, has become what the undisturbed run is: every row that it logged, in whichever attempt,
    and every file of its last checkpoint, to the bit. The rows are also complete and in order, if a repeated row counts once."""
    wanted = rows(whole)
    steps = [(row["step"], tuple(sorted(row))) for row in wanted]
    for row in rows(run):
        key = (row["step"], tuple(sorted(row)))
        assert key in steps, row
        assert row == wanted[steps.index(key)]
    assert {json.dumps(row) for row in rows(run)} == {json.dumps(row) for row in wanted}
    assert content(run) == content(whole)


def temporary_folders(run: Path) -> list[str]:
    """What a save left lying about."""
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("."))
