"""Started on two ranks: what the model's router and experts do inside AutoEP's layers. Writes JSON.

expert_parallel_worker.py MODEL_CONFIG OUTPUT
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from launch.cli import make_quiet
from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.engine.expert_parallel import moe_layers
from launch.engine.step_hook import StepHook
from launch.model_config import load_model_config
from launch.ranks import join

LENGTH, ROWS = 64, 2
PATH = strategy.CONFIG_FOLDER / "cpu_ep2_zero2.json"


def make(model_config: str, *, mode: str, dropout: float) -> Any:
    settings = load_model_config(model_config, expert_dropout=dropout)
    config = strategy.with_mode(strategy.read_config(PATH), mode)
    config.update(train_batch_size=2 * ROWS, train_micro_batch_size_per_gpu=ROWS)
    config["scheduler"]["params"]["warmup_num_steps"] = 2
    config = strategy.resolve_config(config, PATH, world_size=2, num_experts=8, max_steps=100)
    engine = build_engine(build_model(settings, seed=0, attn_implementation="sdpa"), config)
    torch.manual_seed(5 + dist.get_rank())
    return engine


class Collectives(TorchDispatchMode):
    """The number of calls, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._schema.name.split("::")[-1]] += 1
        return func(*args, **(kwargs or {}))


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}


def loads(engine: Any) -> list[int]:
    return [int(layer.router.load_E.sum()) for layer in moe_layers(engine.module)]


def train(engine: Any, steps: int = 3) -> dict[str, Any]:
    hook, losses, norms = StepHook(engine), [], []
    for _ in range(steps):
        with Collectives() as seen:
            loss = engine(**batch(engine.module.config.vocab_size)).loss
            engine.backward(loss)
        hook.step(lambda norm: None)
        losses.append(float(loss.detach()))
        norms.append(hook.grad_norm)
    weights = hashlib.sha256()
    for parameter in engine.module.parameters():
        weights.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    # the last step's, forward and backward
    return {"losses": losses, "norms": norms, "loads": loads(engine), "weights": weights.hexdigest(), "collectives": seen.calls}


def evaluate(engine: Any) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(engine(**batch(engine.module.config.vocab_size)).loss)
    engine.train()
    return loss


def dtypes(engine: Any) -> dict[str, str]:
    """Of router, bias and residual stream, in a forward of the bf16 engine."""
    seen: dict[str, str] = {}
    layer = moe_layers(engine.module)[0]
    layer.router.register_forward_hook(lambda m, i, out: seen.update(weights=str(out[0].dtype), router_input=str(i[0].dtype)))
    layer.register_forward_hook(lambda m, i, out: seen.update(output=str(out.dtype)))
    evaluate(engine)
    return {**seen, "bias": str(layer.router.e_score_correction_bias.dtype), "gate": str(layer.router.gate.weight.dtype)}


def main() -> None:
    make_quiet()
    join.set_environment()
    join.start(timeout=300)
    _, *arguments = [a for a in sys.argv if not a.startswith("--local_rank")]
    model_config, output = arguments
    results: dict[str, Any] = {}
    for mode in ("none", "selective", "full"):
        results[f"dropout_{mode}"] = train(make(model_config, mode=mode, dropout=0.3))
    engine, plain = (make(model_config, mode="full", dropout=rate) for rate in (0.3, 0.0))
    results["dtypes"] = dtypes(engine)
    results["evaluations"] = [evaluate(engine), evaluate(engine), evaluate(plain)]
    results["loads_after_evaluation"] = loads(engine)
    results["plain"] = train(plain)
    results["training_forward"] = [float(engine(**batch(512)).loss.detach()) for _ in range(2)]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(everyone))
    dist.barrier()


if __name__ == "__main__":
    main()
