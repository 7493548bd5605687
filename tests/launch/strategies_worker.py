"""Run by each of two ranks: trains a few steps with each file of ds_configs/ and writes what came out.

    strategies_worker.py MODEL_CONFIG OUTPUT FILE...

Only what the number of ranks forces is changed: batch sizes, and the expert-parallel size where it is larger than there are ranks.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.cli import make_quiet
from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.engine.expert_parallel import moe_layers
from launch.engine.step_hook import StepHook
from launch.model_config import load_model_config
from launch.ranks import join
from model.balance import LoadBalancer

STEPS, LENGTH = 4, 64


def scaled(path: Path, ranks: int) -> dict[str, Any]:
    config = strategy.read_config(path)
    config["expert_parallel"]["autoep_size"] = min(ranks, config["expert_parallel"]["autoep_size"])
    config.update(train_batch_size=4 * ranks, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    config["scheduler"]["params"]["warmup_num_steps"] = 2
    return config


def train(model_config: str, path: Path) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model_settings = load_model_config(model_config)
    config = strategy.resolve_config(
        scaled(path, ranks), path, world_size=ranks, num_experts=model_settings.n_routed_experts, max_steps=100
    )
    engine = build_engine(build_model(model_settings, seed=0, attn_implementation="sdpa"), config)
    hook, balancer = StepHook(engine), LoadBalancer(engine.module, 0.01, dist.all_reduce)
    tokens = torch.randint(0, model_settings.vocab_size, (4 * ranks, LENGTH + 1), generator=torch.Generator().manual_seed(1))

    def step(reason: str | None = None) -> tuple[float, float]:
        """(loss, gradient norm) of a step on the one batch; with a `reason` it is refused."""
        total = torch.zeros(())
        for number in range(2):
            rows = tokens[(2 * number * ranks + 2 * rank) :][:2]
            loss = engine(input_ids=rows[:, :-1].contiguous(), shift_labels=rows[:, 1:].contiguous()).loss
            engine.backward(loss)
            total += loss.detach().float() / 2 / ranks
            if number == 0:
                engine.step()
        dist.all_reduce(total)
        assert hook.step(lambda norm: reason) == reason
        balancer.step() if reason is None else balancer.reset()
        return float(total), hook.grad_norm

    losses, norms = zip(*(step() for _ in range(STEPS)), strict=True)
    before, schedule = held(engine), engine.get_lr()
    refused, unmoved = step("refused"), same(before, held(engine)) and schedule == engine.get_lr()
    again, moved = step(), not same(before, held(engine))
    of_all_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_all_ranks, [norms, unmoved, moved])
    checkpointing = engine.module.model.gradient_checkpointing
    return {
        "losses": losses,
        "norms": norms,
        "ranks_agree": all(other == norms for other, *_ in of_all_ranks),  # they judge a step by it, each for itself
        "refused": refused,
        "again": again,
        "unmoved": all(unmoved for _, unmoved, _ in of_all_ranks),
        "moved": all(moved for *_, moved in of_all_ranks),
        "recomputes": checkpointing,
        "stage": engine.zero_optimization_stage(),
        "ep_size": moe_layers(engine.module)[0].ep_size,
    }


def held(engine: Any) -> list[torch.Tensor]:
    """A copy of what this rank trains: weights as it computes with them, the optimizer's masters and moments."""
    found = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            state = engine.optimizer.state.get(parameter, {})
            found += [parameter, *(torch.as_tensor(state[name]) for name in sorted(state))]
    return [tensor.detach().clone() for tensor in found]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def main() -> None:
    make_quiet()
    join.set_environment()
    join.start(timeout=300)
    _, *arguments = [a for a in sys.argv if not a.startswith("--local_rank")]
    model_config, output, *files = arguments
    results = {}
    for file in files:
        try:
            results[Path(file).name] = train(model_config, Path(file))
        except Exception as error:
            results[Path(file).name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
