"""Started by the `deepspeed` launcher: what a real engine holds and sends in a step, counted tensor by tensor.

    engine_memory_worker.py CASES.json OUTPUT.json

A case is {"model": config.json's fields, "deepspeed": a DeepSpeed JSON, "sequence_length": N}. Knows nothing of the planner.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.cli import make_quiet
from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.ranks import join
from model import MoEGPTConfig


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made since it was entered and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.seen:
            self.seen[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size

    def settled(self) -> int:
        gc.collect()
        return self.now


def unique_bytes(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}


@contextmanager
def counted_traffic() -> Iterator[Counter]:
    """Bytes that this rank's share of each kind of collective is about, by torch.distributed's functions."""
    sizes: Counter = Counter()
    names = ("all_to_all_single", "all_reduce")
    theirs = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if tensors and tensors[0].is_floating_point():
                sizes[name] += max(t.numel() * t.element_size() for t in tensors)
            return theirs[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sizes
    finally:
        for name, function in theirs.items():
            setattr(dist, name, function)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps; the second is counted, when all state is there."""
    model = MoEGPTConfig(**case["model"])
    path = Path("case.json")
    config = strategy.resolve_config(
        case["deepspeed"], path, world_size=dist.get_world_size(), num_experts=model.n_routed_experts, max_steps=100
    )
    with LiveBytes() as live:
        engine = build_engine(build_model(model, seed=0, attn_implementation="flash"), config)
        step(engine, live, model, config, case["sequence_length"])
        live.most = live.now
        with counted_traffic() as traffic:
            found = step(engine, live, model, config, case["sequence_length"])
    found.update(most=most_of_all_ranks(live.most), traffic=traffic, **states(engine))
    engine.destroy()
    return found


def most_of_all_ranks(most: int) -> int:
    """Ranks own other parts of the gradients, and make room for them at other moments."""
    fullest = torch.tensor(most)
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    return int(fullest)


def step(engine: Any, live: LiveBytes, model: MoEGPTConfig, config: dict[str, Any], length: int) -> dict[str, Any]:
    batch, found = config["train_micro_batch_size_per_gpu"], {}
    for _ in range(config["gradient_accumulation_steps"]):
        ids = torch.randint(0, model.vocab_size, (batch, length + 1))
        before = live.settled()
        loss = engine(
            input_ids=ids[:, :-1].contiguous(), shift_labels=ids[:, 1:].contiguous(), num_items_in_batch=batch * length
        ).loss
        found["activations"] = live.settled() - before
        engine.backward(loss)
        del loss
        found["before_step"] = live.settled()
        engine.step()
    return found


def states(engine: Any) -> dict[str, int]:
    """Bytes of weights and buffers, and of the optimizer's parameters and states that are not the same memory."""
    parameters = list(engine.module.parameters())
    weights = unique_bytes([*(getattr(p, "ds_tensor", p.data) for p in parameters), *engine.module.buffers()])
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)  # without ZeRO fp32 is stepped by torch's own
    grouped = [parameter for group in inner.param_groups for parameter in group["params"]]
    masters = getattr(zero, "fp32_partitioned_groups_flat", grouped)  # ZeRO-3's groups hold one part at a time
    held = unique_bytes([*masters, *(value for state in inner.state.values() for value in state.values())])
    return {"weights": sum(weights.values()), "optimizer": sum(size for key, size in held.items() if key not in weights)}


def main() -> None:
    make_quiet()
    join.set_environment()
    join.start(timeout=600)
    cases, output = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    results = []
    for case in json.loads(Path(cases).read_text()):
        try:
            results.append(measure(case))
        except Exception:
            results.append({"error": traceback.format_exc()})
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
