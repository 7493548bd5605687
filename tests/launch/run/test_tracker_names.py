"""Grouped names, few at the brief level."""

from __future__ import annotations

import math

from launch.run.tracker_names import grouped

ROW = {
    "step": 5, "time": 1.0, "samples": 8, "tokens": 64, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 100.0,
    "mfu": None, "load_max_over_mean": [1.0] * 24, "max_vio": [i / 10 for i in range(24)], "load_entropy": [0.5, None] * 12,
    "bias_range": [], "update_to_weight": {"decay": 1e-3}, "skipped": "loss is nan", "skipped_samples": [1, 2],
    "expert_load": [[1, 2]], "perplexity": math.inf,
}  # fmt: skip


def test_names_are_grouped() -> None:
    found = grouped(ROW, detailed=False)
    assert {name.split("/")[0] for name in found} == {"train", "router", "speed", "progress"}
    assert found["train/loss"] == 2.0 and found["train/skipped"] == 1.0 and found["train/update_to_weight/decay"] == 1e-3
    assert found["speed/tokens_per_second"] == 100.0 and found["progress/tokens"] == 64
    assert found["router/max_vio/max"] == 2.3 and found["router/load_entropy/median"] == 0.5
    assert all(math.isfinite(value) for value in found.values())
    assert grouped({"step": 5, "eval/python_loss": 1.0}, detailed=False) == {"eval/python_loss": 1.0}
    assert grouped({"step": 5, "val_loss": 1.0, "val_bits_per_byte": 0.5}, detailed=False) == {
        "validation/val_loss": 1.0, "validation/val_bits_per_byte": 0.5,
    }  # fmt: skip


def test_the_brief_level_does_not_grow_with_the_layers() -> None:
    brief, detailed = grouped(ROW, detailed=False), grouped(ROW, detailed=True)
    assert len([name for name in brief if "max_vio" in name]) == 5
    assert len([name for name in detailed if "max_vio" in name]) == 5 + 24
    assert detailed["router_layers/max_vio/7"] == 0.7 and brief.items() <= detailed.items()
