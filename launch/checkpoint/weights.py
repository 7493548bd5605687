"""The whole weights of a checkpoint, whatever number of ranks, EP size and ZeRO stage wrote it.

The fp32 masters lie in the optimizer's shards: each rank has a slice of every group of parameters, laid end to end. The
shards of one parameter follow each other in the order of the ranks; an expert weight (`experts.w1`, `w2`, `w3`) is first put
together for each EP rank, from the ranks that share its experts, and then the EP ranks follow each other, experts in numeric order.
Muon's momentum is not cut so: a rank keeps it whole for each matrix of which it has a part.

Nothing here verifies: `manifest.check_files` comes first. Files are mapped, not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cli import UserError
from launch.checkpoint.unpickle import load_file

#: DeepSpeed's file of the weights that no rank has for itself, under ZeRO 0 to 2.
MODEL_STATES = "mp_rank_00_model_states.pt"
#: AutoEP's fused expert weights: `[local experts, ...]` on each EP rank.
EXPERT_WEIGHT = re.compile(r"\.experts\.w[123]$")
#: What Muon keeps of its matrices in the place of Adam's moments.
MOMENTUM = "momentum_buffer"
#: Numbers compared together: on a GPU each needs some twenty bytes meanwhile.
CHUNK = 1 << 24
ROUNDING = 2.0**-6  # of a master to the dtype of the engine: bf16's is 2^-8, of the nearest


def numbered(folder: Path, pattern: str) -> list[Path]:
    """The files that match, by the rank or expert in their names: as strings, 10 would come before 9."""
    return sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"_(\d+)", p.name)])


def optimizer_shards(folder: Path) -> list[Path]:
    """The ranks' parts of the optimizer; none without ZeRO."""
    return numbered(folder, "*zero_pp_rank_*_optim_states.pt")


def module_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as the engine computed with it (bf16 in a bf16 run). ZeRO 0 to 2."""
    return ((name, read()) for name, read in _module_readers(folder).items())


def _module_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    model = load_file(folder / MODEL_STATES)
    module = model["module"]
    readers: dict[str, Callable[[], Tensor]] = {
        name: partial(module.__getitem__, name) for name in module if name not in model["buffer_names"]
    }
    for layer in model["ds_autoep_layers"]:
        files = numbered(folder, f"layer_{layer['moe_layer_id']}_expert_*_model_states.pt")
        experts = [load_file(file) for file in files]
        for weight in ("w1", "w2", "w3"):
            name = f"{layer['expert_key_prefix']}.{weight}"
            readers[name] = partial(_stacked, experts, name)
    return readers


def _stacked(experts: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([expert[f"{name}.{number}"] for number, expert in enumerate(experts)])


def master_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter, whole and in fp32: the optimizer's masters. Shared (tied) ones come once.

    In ZeRO 0 the module's own weights are the masters. Raises UserError where the shards do not add up to a parameter, or
    (ZeRO 1 and 2) to another one than the engine computed with.
    """
    shards = optimizer_shards(folder)
    if not shards:
        for name, weight in module_weights(folder):
            yield name, weight.float()
        return
    of_ranks = numbered(folder, "zero_pp_rank_*_model_states.pt")  # ZeRO 3, which has the module in no other form
    models = of_ranks or [folder / MODEL_STATES]
    computed_with = {} if of_ranks else _module_readers(folder)
    first = load_file(models[0])
    slices = [_slices(load_file(shard), load_file(models[min(i, len(models) - 1)])) for i, shard in enumerate(shards)]
    ep_size = first["ds_autoep_layers"][0]["ep_size"]
    for name, shape in ((name, shape) for group in first["param_shapes"] for name, shape in group.items()):
        parts = [rank.get(name) for rank in slices]
        whole = _assemble(name, tuple(shape), parts, ep_size if EXPERT_WEIGHT.search(name) else 1)
        if name in computed_with:
            check_master(whole, computed_with[name](), folder, name)
        yield name, whole


def check_master(master: Tensor, weight: Tensor, where: Path, name: str) -> None:
    """Raises UserError where a master is not the fp32 of the weight that the engine computed with: the file's numbers are right,
    and lie in another order than its own description says. DeepSpeed's does with `round_robin_gradients`."""
    parts = zip(master.reshape(-1).split(CHUNK), weight.reshape(-1).split(CHUNK), strict=False)
    differing = (own for own, other in parts if not torch.allclose(own, other.to(own.device, own.dtype), rtol=ROUNDING, atol=1e-7))
    # What is no number is no number's equal: `check_finite` says that.
    if master.numel() != weight.numel() or any(bool(torch.isfinite(part).all()) for part in differing):
        raise UserError(
            f"{where}: {name} in the optimizer's files is not the weight that the model computed with, as it is for a run with "
            "zero_optimization.round_robin_gradients: DeepSpeed then records a wrong order, and exports and conversions "
            "would be wrong"
        )


def whole_momenta(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Muon's momentum of every matrix, whole, of a checkpoint of ZeRO 1 or 2 without offload. Raises UserError where one lacks."""
    first = load_file(folder / MODEL_STATES)
    shapes = {name: tuple(shape) for group in first["param_shapes"] for name, shape in group.items()}
    ranks = [dict(_momenta(shard, shapes)) for shard in optimizer_shards(folder)]
    size = first["ds_autoep_layers"][0]["ep_size"]
    for name in (name for name in shapes if any(name in rank for rank in ranks)):
        ep_size = size if EXPERT_WEIGHT.search(name) else 1
        parts = [next((rank[name] for rank in ranks[e::ep_size] if name in rank), None) for e in range(ep_size)]
        there = [part for part in parts if part is not None]
        if len(there) < ep_size:
            raise UserError(f"{folder}: Muon's momentum of {name} is on {len(there)} of {ep_size} EP ranks")
        yield name, torch.cat(there)


def _momenta(shard: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """One rank's: the matrices that its partition overlaps, whole and end to end, though it steps only its slice of the first and
    the last. See `_muon_momentum_buffer` in deepspeed/runtime/zero/stage_1_and_2.py."""
    state = load_file(shard)["optimizer_state_dict"]
    moments = flat_moments(state)
    for number, group in enumerate(placements(state, [])):
        momentum = moments.get(number, {}).get(MOMENTUM)
        if momentum is None:
            continue
        sizes = [math.prod(shapes[name]) for name in group]
        if sum(sizes) != momentum.numel():
            raise UserError(f"{shard}: Muon's momentum has {momentum.numel()} elements, and its matrices have {sizes}")
        for name, part in zip(group, momentum.split(sizes), strict=True):
            yield name, part.view(shapes[name])


def _assemble(name: str, shape: tuple[int, ...], parts: list[Tensor | None], ep_size: int) -> Tensor:
    """The ranks' slices of one parameter put together; `shape` is one EP rank's. EP rank e is on ranks e, e + ep_size, ..."""
    flat = [torch.cat([p for p in parts[e::ep_size] if p is not None]) for e in range(ep_size)]
    if any(f.numel() != math.prod(shape) for f in flat):
        raise UserError(f"{name}: shards of {[f.numel() for f in flat]} numbers do not make {ep_size} x {shape}")
    return torch.cat([f.view(shape) for f in flat])


def _slices(shard: dict[str, Any], model: dict[str, Any]) -> dict[str, Tensor]:
    """One rank's flat slice of each parameter that it has a part of."""
    state = shard["optimizer_state_dict"]
    groups = zip(flat_masters(state), placements(state, model["param_shapes"]), strict=True)
    return {name: flat[at] for flat, group in groups for name, at in group.items()}


def flat_masters(state: Mapping[str, Any]) -> list[Tensor]:
    """The fp32 masters of one rank, a flat tensor a group, as ZeRO 1 and 2 or ZeRO 3 name them."""
    return list(state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"])


def flat_moments(state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What the optimizer keeps for each of these flat tensors, by the group's number."""
    inner = state.get("optimizer_state_dict") or state.get("base_optimizer_state") or {}
    return dict(inner.get("state", {})) if isinstance(inner, Mapping) else {}


def placements(state: Mapping[str, Any], shapes: list[dict[str, Any]]) -> list[dict[str, slice]]:
    """Where each parameter lies in the flat tensor of its group; what lies between is padding. `shapes` is for ZeRO 3 alone."""
    if "fp32_flat_groups" not in state:
        return [
            {name: slice(at.start, at.start + at.numel) for name, at in mapping.items()}
            for mapping in state["param_slice_mappings"]
        ]
    return [
        _stage3_placement(group, partition["partition_count"], partition["partition_rank"])
        for group, partition in zip(shapes, state["ds_zero_partition_groups"], strict=True)
    ]


def _stage3_placement(group: dict[str, Any], count: int, rank: int) -> dict[str, slice]:
    """ZeRO 3 cuts each parameter by itself, into equal parts, the last ones padded."""
    out, offset = {}, 0
    for name, shape in group.items():
        whole = math.prod(shape)
        part = math.ceil(whole / count)
        out[name] = slice(offset, offset + max(0, min(part, whole - rank * part)))
        offset += part
    return out
