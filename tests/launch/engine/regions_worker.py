"""A rank that trains a small model for three steps, eager and with compiled regions, for each way of recomputing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.engine.regions import compile_regions
from launch.ranks import join
from model import MoEGPTConfig
from model.sinks import watching_sink_mass

PATH = strategy.CONFIG_FOLDER / "cpu_ep2_zero2.json"


def train(mode: str, *, compiled: bool) -> list[list[float]]:
    """[loss, gradient norm] of each step; the loss of an evaluation, and from how many layers it heard of the sinks."""
    config = MoEGPTConfig.preset("tiny", vocab_size=512, hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
    settings = strategy.with_mode(strategy.read_config(PATH), mode)
    settings.update(train_batch_size=4)
    settings["optimizer"]["params"]["lr"] = 1e-2
    del settings["scheduler"]
    settings = strategy.resolve_config(settings, PATH, world_size=2, num_experts=8, max_steps=3)
    engine = build_engine(build_model(config, seed=0, attn_implementation="flash"), settings)
    if compiled:
        compile_regions(engine.module, "aot_eager")
    rows = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, 512, (2, 65), generator=generator)
        loss = engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
        engine.backward(loss)
        engine.step()
        rows.append([float(loss), float(engine.get_global_grad_norm())])
    engine.eval()
    masses: list[torch.Tensor] = []
    with torch.no_grad(), watching_sink_mass(masses.append):
        rows.append([float(engine(input_ids=ids, shift_labels=ids).loss), float(len(masses))])
    return rows


join.set_environment()
join.start(timeout=120)
result = {}
for mode in strategy.CHECKPOINTING_MODES:
    torch.compiler.reset()
    counters.clear()
    result[mode] = {"eager": train(mode, compiled=False), "compiled": train(mode, compiled=True)}
    result[mode].update(graphs=counters["stats"]["unique_graphs"], breaks=dict(counters["graph_break"]))
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(result))
