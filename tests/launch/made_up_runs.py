"""Run folders for the report's tests: metrics by formula, with the faults that a test asks for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TOKENS = 524_288  # of one step
CONFIG: dict[str, Any] = {
    "model": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "router_bias_rate": 0.001,
    },
    "sequence_length": 2048,
    "global_batch": 256,
    "seed": 1234,
    "world_size": 8,
    "ep_size": 8,
    "zero_stage": 2,
    "dtype": "bfloat16",
    "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 0.0003}}, "gradient_clipping": 1.0},
    "arguments": {"model": "800m", "max_steps": 1000, "stop_after": 0, "output": "runs/first"},
    "host": "node-1",
    "git_commit": "0" * 40,
}


def expected_loss(step: int) -> float:
    """Without the noise."""
    return 1.6 + 9 * (step + 30) ** -0.35


def training_row(step: int, noise: random.Random, layers: int = 4) -> Row:
    """A healthy step."""
    return {
        "step": step,
        "samples": step * 256,
        "tokens": step * TOKENS,
        "loss": expected_loss(step) + noise.gauss(0, 0.03),
        "grad_norm": 0.4 + abs(noise.gauss(0, 0.1)),
        "load_max_over_mean": [1.1 + 0.1 * noise.random() for _ in range(layers)],
        "load_entropy": [0.98 + 0.01 * noise.random() for _ in range(layers)],
        "unused_experts": [0.0] * layers,
        "bias_range": [0.1 + 0.1 * noise.random() for _ in range(layers)],
        "router_logit_rms": [1.0 + noise.random() for _ in range(layers)],
        "lr": 3e-4 * min(1.0, step / 100),
        "tokens_per_second": 380_000 + noise.gauss(0, 4000),
        "mfu": 0.41,
        "step_seconds": 1.38,
        "data_seconds": 0.01,
        "clipped_share": 0.02,
    }


def healthy_rows(steps: int = 1000, every: int = 5, change: Callable[[Row], object] | None = None, layers: int = 4) -> list[Row]:
    """With an evaluation and a checkpoint each tenth of the way; `change` edits each training row in place."""
    noise, rows = random.Random(7), []
    for step in range(every, steps + 1, every):
        row = training_row(step, noise, layers)
        if change:
            change(row)
        rows.append(row)
        if step % (steps // 10) == 0:
            loss = expected_loss(step) + 0.05
            rows.append({"step": step, "val_loss": loss, "val_bits_per_byte": loss / math.log(2) / 3.5})
            rows.append({"step": step, "save_seconds": 0.4})
    return rows


def write_run(folder: Path, rows: list[Row] | None = None, **config: Any) -> Path:
    """`config` overrides parts of CONFIG."""
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in (healthy_rows() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return folder
