"""What the ranks of `training_process.launch_ranks` do: each function is collective and returns something JSON can hold."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: E402
from stub_engine import replace_file  # noqa: E402

from data.cli import UserError  # noqa: E402
from launch import manifest  # noqa: E402
from launch.checkpoint import choose  # noqa: E402
from launch.checkpoint.engine_files import state_bytes  # noqa: E402
from launch.checkpoint.identity import RunIdentity  # noqa: E402
from launch.checkpoint.manager import CheckpointManager  # noqa: E402
from launch.checkpoint.state import TrainingState  # noqa: E402
from launch.checkpoint.unpickle import load_file  # noqa: E402
from launch.checkpoint.weights import master_weights  # noqa: E402
from launch.engine.build import build_engine, build_model  # noqa: E402
from launch.engine.expert_parallel import moe_layers  # noqa: E402
from launch.ranks.join import start  # noqa: E402
from model import MoEGPTConfig  # noqa: E402
from model.balance import LoadBalancer  # noqa: E402

GLOBAL_BATCH, SEQUENCE, VOCABULARY = 8, 24, 97


def model_config(**overrides: Any) -> MoEGPTConfig:
    """Odd sizes, so that nothing divides by luck; dropout, so that random states matter; twelve experts, so that 10 follows 9."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "moe_intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 16, "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3,
        "max_position_embeddings": 64, "rope_parameters": None, "expert_dropout": 0.1, "router_bias_rate": 0.01,
    }  # fmt: skip
    return MoEGPTConfig.preset("tiny", **{**fields, **overrides})


def deepspeed_config(stage: int, dtype: str, ep: int, optimizer: str = "AdamW") -> dict[str, Any]:
    world_size = dist.get_world_size()
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.01, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 40, "warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
        },
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10000, "allgather_bucket_size": 10000},
        "expert_parallel": {"enabled": True, "autoep_size": ep, "preset_model": "deepseek_v3", "use_grouped_mm": False},
    }
    if optimizer == "Muon":
        config["optimizer"]["params"].update(muon_lr=0.01, momentum=0.9)
        config["optimizer"]["type"], config["gradient_clipping"] = "Muon", 0.0
    if dtype == "bfloat16":
        config.update(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    return config


class SmallRun:
    """An engine on made-up data with the loop's essentials: loss, step, balance. Sample i is a function of i alone."""

    def __init__(self, folder: str | Path, *, stage: int, dtype: str, ep: int, seed: int = 1, background: bool = False,
                 resume: str | None = None, optimizer: str = "AdamW", zero: dict[str, Any] | None = None,
                 **config: Any) -> None:  # fmt: skip
        self.config = model_config(**config)
        identity = RunIdentity(
            model=self.config.to_dict(), data="made up", sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH,
            world_size=dist.get_world_size(), ep_size=ep, zero_stage=stage, dtype=dtype,
        )  # fmt: skip
        self.manager = CheckpointManager(Path(folder), keep_last=0, keep_every=0, identity=identity, background=background)
        self.choice = self.manager.choose(resume) if resume else None
        model = build_model(self.config, seed=seed, attn_implementation="sdpa")
        ds = deepspeed_config(stage, dtype, ep, optimizer)
        ds["zero_optimization"].update(zero or {})
        self.engine = build_engine(model, self.choice.deepspeed_config(ds) if self.choice else ds)
        self.balancer = LoadBalancer.of(self.config, self.engine.module, dist.all_reduce)
        self.step = self.samples = 0
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(1000 * seed + dist.get_rank())
        if isinstance(self.choice, choose.ResumeFrom):
            self.restore(self.choice)

    def restore(self, choice: choose.ResumeFrom) -> None:
        state = self.manager.load(self.engine, choice)
        self.step, self.samples = state.step, state.samples

    def batch(self) -> dict[str, torch.Tensor]:
        share = GLOBAL_BATCH // dist.get_world_size()
        first = self.samples + dist.get_rank() * share
        generators = [torch.Generator().manual_seed(7 + i) for i in range(first, first + share)]
        ids = torch.stack([torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=g) for g in generators]) // 3 * 3
        return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}

    def loss(self) -> torch.Tensor:
        items = GLOBAL_BATCH * SEQUENCE / dist.get_world_size()
        return self.engine(**self.batch(), num_items_in_batch=items).loss

    def train(self, steps: int) -> list[list[float]]:
        """[global loss, learning rate, this rank's random number] of each step."""
        rows = []
        for _ in range(steps):
            loss = self.loss()
            self.engine.backward(loss)
            self.engine.step()
            self.balancer.step()
            self.step, self.samples = self.step + 1, self.samples + GLOBAL_BATCH
            total = loss.detach().double().clone()
            dist.all_reduce(total)
            drawn = float(torch.rand(())) + random.random() + float(np.random.rand())
            rows.append([float(total) / dist.get_world_size(), self.engine.get_lr()[0], drawn])
        return rows

    def first_loss(self) -> float:
        """The global loss of the next batch, without dropout and without training."""
        self.engine.eval()
        with torch.no_grad():
            total = self.loss().double()
        self.engine.train()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def state(self, **extra: Any) -> TrainingState:
        return TrainingState(step=self.step, samples=self.samples, tokens=self.samples * SEQUENCE, best_loss=0.1 + 0.2, extra=extra)

    def save(self, **options: Any) -> Path:
        return self.manager.save(self.engine, self.state(), **options)

    def digest(self) -> str:
        """Of everything on all ranks that training goes on from: module, optimizer, buffers."""
        tensors = list(self.engine.module.state_dict().values())
        for group in self.engine.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.engine.optimizer.state[parameter]
                tensors += [parameter, *(torch.as_tensor(state[name]) for name in sorted(state))]
        h = hashlib.sha256()
        for tensor in tensors:
            h.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        digests = [None] * dist.get_world_size()
        dist.all_gather_object(digests, h.hexdigest())
        return "".join(map(str, digests))

    def counters(self) -> list[int]:
        return [self.engine.global_steps, self.engine.global_samples, self.engine.skipped_steps]

    def bias(self) -> list[list[float]]:
        return [layer.router.e_score_correction_bias.tolist() for layer in moe_layers(self.engine.module)]


def same_topology(folder: str, kinds: list[tuple[int, str]], ep: int) -> dict[str, Any]:
    """For each (stage, dtype): an uninterrupted run against one that saves, forgets all and resumes, twice.

    Balanced by quantiles: a bias of the step's scores shows any difference, where the sign rule's step would hide it.
    """
    out = {}
    for stage, dtype in kinds:
        where = Path(folder) / f"zero{stage}-{dtype}"
        whole = SmallRun(where, stage=stage, dtype=dtype, ep=ep, router_balance="quantile")
        rows = whole.train(3)
        path = whole.save()
        uninterrupted = rows + whole.train(2)
        middle = whole.digest()
        whole.save(is_best=True)
        uninterrupted += whole.train(2)
        other = SmallRun(where, stage=stage, dtype=dtype, ep=ep, seed=99, resume="step_3", router_balance="quantile")
        bias_loaded = other.bias()
        resumed = other.train(2)
        middle_resumed = other.digest()
        again = SmallRun(where, stage=stage, dtype=dtype, ep=ep, seed=98, resume="auto", router_balance="quantile")
        resumed += again.train(2)
        out[f"zero{stage}-{dtype}"] = {
            "uninterrupted": uninterrupted[3:], "resumed": resumed, "digests": [whole.digest(), again.digest()],
            "middle": [middle, middle_resumed], "counters": [whole.counters(), again.counters()], "message": again.choice.message,
            "bias_loaded": bias_loaded, "files": sorted(p.name for p in path.iterdir()), "folder": str(where),
        }  # fmt: skip
    return out


def full_state(run: SmallRun) -> dict[str, dict[str, str]]:
    """A hash of every parameter's fp32 master and moments, whole: ZeRO partitions and experts of all ranks put together."""
    engine, out = run.engine, {}
    momenta = full_momenta(engine)
    for name, parameter in engine.module.named_parameters():
        out[name] = {}
        if name in momenta:
            out[name]["momentum"] = momenta[name]
        for key in ("fp32",) if name in momenta else ("fp32", "exp_avg", "exp_avg_sq"):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = full_value(engine, parameter, key)
            if not getattr(parameter, "allreduce", True):
                group = groups._get_expert_parallel_group(parameter.group_name)
                parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, value.contiguous(), group=group)
                value = torch.cat(parts)
            out[name][key] = hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
    return out


def full_momenta(engine: Any) -> dict[str, str]:
    """A hash of Muon's momentum of each matrix, all its experts. Ranks that step parts of one have it alike but for rounding: what
    `torch.compile` makes of the step depends on the shapes that a rank has seen. The first one's is what a conversion takes."""
    mine = {}
    for group, matrices in zip(engine.optimizer.param_groups, getattr(engine.optimizer, "params_in_partition", ()), strict=False):
        if not group.get("use_muon") or not matrices:
            continue
        momentum, at = engine.optimizer.state[group["params"][0]]["momentum_buffer"].float().numpy(), 0
        for parameter in matrices:
            ep_rank = 0 if getattr(parameter, "allreduce", True) else groups._get_expert_parallel_rank(parameter.group_name)
            part, at = momentum[at : at + parameter.numel()].tobytes(), at + parameter.numel()
            mine[engine.optimizer.param_names[parameter], ep_rank] = part
        assert at == momentum.size
    found: dict[tuple[str, int], bytes] = {}
    for theirs in everyone(mine):
        for key, part in theirs.items():
            first = np.frombuffer(found.setdefault(key, part), np.float32)
            distance = np.abs(first - np.frombuffer(part, np.float32)).max()
            assert distance <= 1e-3 * np.abs(first).max(), f"{key} is not the same on two ranks"
    whole: dict[str, bytes] = {}
    for (name, _), part in sorted(found.items()):
        whole[name] = whole.get(name, b"") + part
    assert all(any(part) for part in whole.values()), "a momentum of zeros shows nothing"
    return {name: hashlib.sha256(part).hexdigest()[:16] for name, part in whole.items()}


def full_value(engine: Any, parameter: torch.Tensor, key: str) -> torch.Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if key == "fp32" else engine.optimizer.state[parameter][key]
    if key == "fp32":
        return safe_get_full_fp32_param(parameter)
    if engine.zero_optimization_stage() == 3:
        return safe_get_full_optimizer_state(parameter, key)
    if parameter._hp_mapping is not None:  # this rank's partition has a part of it; DeepSpeed links the two only lazily
        flat = engine.optimizer.param_groups[parameter._hp_mapping.param_group_index]["params"][0]
        parameter._hp_mapping.set_optim_state_fragment(flat, engine.optimizer.state[flat])
    return safe_get_full_optimizer_state(parameter, key)


def forget_expert_groups() -> None:
    """DeepSpeed keeps expert groups for the life of a process; a test has engines of several EP sizes in one."""
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        setattr(groups, name, {})
        setattr(groups, f"{name}_RANKS", {})


def adam_steps(run: SmallRun) -> list[float]:
    """The `step` of every optimizer state of this rank, which must be tensors of their own."""
    states = [state["step"] for state in run.engine.optimizer.state.values() if "step" in state]
    assert len({step.data_ptr() for step in states}) == len(states), "states that share their step"
    assert all(step.dtype == torch.float32 and step.device.type == "cpu" for step in states)
    return sorted({float(step) for step in states})


def describe(run: SmallRun) -> dict[str, Any]:
    return {
        "first_loss": run.first_loss(), "state": full_state(run), "bias": run.bias(), "counters": run.counters(),
        "position": [run.step, run.samples], "lr": run.engine.get_lr(), "message": run.choice.message if run.choice else "",
        "adam_steps": adam_steps(run),
    }  # fmt: skip


def make(folder: str, kinds: list[tuple[int, str]], ep: int, optimizer: str = "AdamW") -> dict[str, Any]:
    """Short runs, one for each (stage, dtype), each saved at step 3, and the losses they go on with."""
    out = {}
    for stage, dtype in kinds:
        run = SmallRun(
            Path(folder) / f"zero{stage}-{dtype}", stage=stage, dtype=dtype, ep=ep, expert_dropout=0.0, optimizer=optimizer
        )
        run.train(3)
        run.save()
        out[f"zero{stage}-{dtype}"] = describe(run)
        out[f"zero{stage}-{dtype}"]["next_losses"] = [row[0] for row in run.train(3)]
    return out


def take(folder: str, cases: list[tuple[str, int, str, int]], optimizer: str = "AdamW") -> dict[str, Any]:
    """Resume each (source, stage, dtype, ep) in this launch's layout; train on, save, resume that plainly, roll back."""
    out = {}
    for source, stage, dtype, ep in cases:
        forget_expert_groups()
        where = Path(folder) / f"ws{dist.get_world_size()}" / f"{source}-to-zero{stage}-{dtype}-ep{ep}"
        if dist.get_rank() == 0:
            shutil.copytree(Path(folder) / source, where)
        dist.barrier()
        layout = {"stage": stage, "dtype": dtype, "ep": ep, "expert_dropout": 0.0, "optimizer": optimizer}
        run = SmallRun(where, seed=50, resume="auto", **layout)
        found = describe(run)
        found["converted"] = sorted(p.name for p in (where / "checkpoints").iterdir())
        first = run.train(1)
        found["adam_steps_after_one"] = adam_steps(run)
        run.save()
        found["saved"] = {name: state["fp32"] for name, state in full_state(run).items()}
        found["after_save"] = sorted(p.name for p in (where / "checkpoints").iterdir())
        trained = run.train(2)
        found["next_losses"] = [row[0] for row in first + trained]
        plain = SmallRun(where, seed=51, resume="auto", **layout)
        found["second"] = [trained, plain.train(2), plain.choice.conversions]
        run.restore(run.manager.newest())  # by the engine that started from the conversion
        found["rolled_back"] = run.train(2)
        found["folder"] = str(where)
        out[f"{source}-to-zero{stage}-{dtype}-ep{ep}"] = found
    return out


def sizes(folder: str, kinds: list[tuple[int, str, int, str]]) -> dict[str, list[int]]:
    """For each (stage, dtype, EP size, optimizer): what a save is expected to take before a step and after one, and what it took.
    Large enough that the files' headers hardly count."""
    out = {}
    for stage, dtype, ep, optimizer in kinds:
        forget_expert_groups()
        name = f"zero{stage}-{dtype}-ep{ep}-{optimizer}"
        larger = {"hidden_size": 96, "moe_intermediate_size": 80}
        run = SmallRun(Path(folder) / name, stage=stage, dtype=dtype, ep=ep, optimizer=optimizer, **larger)
        first = sum(everyone(state_bytes(run.engine)))
        run.train(1)
        expected = sum(everyone(state_bytes(run.engine)))
        path = run.save()
        out[name] = [first, expected, sum(file.stat().st_size for file in path.iterdir())]
    return out


def tied(folder: str) -> dict[str, Any]:
    """A model whose head is its embedding, from each stage to the other, by a run that begins at another run's checkpoint."""
    kind: dict[str, Any] = {"dtype": "float32", "ep": 1, "expert_dropout": 0.0, "tie_word_embeddings": True}
    out = {}
    for stage, other in ((0, 2), (2, 0)):
        run = SmallRun(Path(folder) / f"zero{stage}", stage=stage, **kind)
        run.train(2)
        run.save()
        new = SmallRun(
            Path(folder) / f"zero{other}-of-{stage}", stage=other, seed=9, resume=str(Path(folder) / f"zero{stage}"), **kind
        )
        out[f"{stage} to {other}"] = [[each.first_loss(), full_state(each)] for each in (run, new)]
    return out


def out_of_order(folder: str) -> dict[str, str]:
    """A run whose partitions DeepSpeed laid out otherwise than it writes down: what is said of its checkpoint when it is resumed,
    resumed without that, converted and exported."""
    kind: dict[str, Any] = {"stage": 2, "dtype": "bfloat16", "ep": 2}
    run = SmallRun(folder, zero={"round_robin_gradients": True}, **kind)
    run.train(2)
    path = run.save()
    again = SmallRun(folder, resume="auto", zero={"round_robin_gradients": True}, **kind)
    said = {"as it was": again.choice.message}
    converting = {**kind, "ep": 1, "resume": "auto"}
    for name, attempt in {
        "without": lambda: SmallRun(folder, resume="auto", **kind),
        "masters": lambda: list(master_weights(path)),
        "aligned": lambda: SmallRun(folder, resume="auto", zero={"parameter_alignment": True}, **kind),
        "converted": lambda: (forget_expert_groups(), SmallRun(folder, **converting)),
    }.items():
        try:
            attempt()
        except UserError as error:
            said[name] = str(error)
    return said


def exportable(folder: str, runs: dict[str, dict[str, Any]], ep: int) -> None:
    """Each named run trains, gets correction biases that reroute, is saved, and leaves the engine's logits beside."""
    for name, options in runs.items():
        run = SmallRun(Path(folder) / name, ep=ep, **options)
        run.train(2)
        for number, layer in enumerate(moe_layers(run.engine.module)):
            noise = torch.randn(12, generator=torch.Generator().manual_seed(number)) * 0.3
            layer.router.e_score_correction_bias.copy_(noise)
        run.save(is_best=True)
        ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
        run.engine.eval()
        with torch.no_grad():
            logits = run.engine.module(ids).logits
            for layer in moe_layers(run.engine.module):
                layer.router.e_score_correction_bias.zero_()
            unbiased = run.engine.module(ids).logits
        if dist.get_rank() == 0:
            torch.save({"ids": ids, "logits": logits, "unbiased": unbiased}, Path(folder) / name / "expected.pt")


def everyone(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def in_the_background(folder: str, kinds: list[tuple[int, str]]) -> dict[str, Any]:
    """Saves that a slow disk draws out over several training steps, a failing one, and what resumes from them."""
    out = {}
    write = manifest.HashingFile.write

    def slow_write(file: manifest.HashingFile, data: bytes) -> int:
        time.sleep(0.002)
        return write(file, data)

    for stage, dtype in kinds:
        kind = {"stage": stage, "dtype": dtype, "ep": 2}
        where = Path(folder) / f"zero{stage}-{dtype}"
        run = SmallRun(where, background=True, **kind)
        rows = run.train(2)
        manifest.HashingFile.write = slow_write
        path = run.save()
        rows += run.train(2)
        meanwhile = not path.exists()
        path = run.save(is_best=True)  # waits for the first
        first_whole = (where / "checkpoints/step_2/manifest.json").exists()
        rows += run.train(1)
        run.manager.wait()
        manifest.HashingFile.write = write
        resumed = []
        for step in (2, 4):
            other = SmallRun(where, seed=30, resume=f"step_{step}", **kind)
            resumed.append(other.train(5 - step))
        out[f"zero{stage}-{dtype}"] = {
            "overlapped": everyone(meanwhile), "first_whole": everyone(first_whole),
            "rows": rows, "resumed": resumed, "digests": [run.digest(), other.digest()],
        }  # fmt: skip
    if dist.get_rank() == 1:
        manifest.HashingFile.write = failing_write
    run.save()
    rows = run.train(1)
    try:
        run.manager.wait()
        out["failure"] = everyone("")
    except ValueError as error:
        out["failure"] = everyone(str(error))
    manifest.HashingFile.write = write
    out["left"] = sorted(p.name for p in (where / "checkpoints").iterdir())
    return out


def failing_write(file: manifest.HashingFile, data: bytes) -> int:
    file.error = OSError(28, "No space left on device", "disk")
    raise file.error


def rank_faults(folder: str) -> dict[str, Any]:
    """Faults that strike rank 1 alone, between them training that must equal an uninterrupted run."""
    kind, last = {"stage": 2, "dtype": "float32", "ep": 2}, dist.get_world_size() - 1
    whole = SmallRun(Path(folder) / "uninterrupted", **kind)
    expected = whole.train(5)
    run = SmallRun(Path(folder) / "run", **kind)
    trained = run.train(2)
    run.save()
    out: dict[str, Any] = {}

    # A disk that is full for the last rank only: a file of more than so many bytes cannot be written.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trained += run.train(1)
    if dist.get_rank() == last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        run.save()
        out["full_disk"] = everyone("saved")
    except ValueError as error:
        out["full_disk"] = everyone(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out["after_full_disk"] = sorted(p.name for p in (Path(folder) / "run/checkpoints").iterdir())
    trained += run.train(1)
    run.save()

    # A file that the last rank alone cannot read.
    unseen = "step_4/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    check = manifest.check_files

    def check_with_a_hole(where: Path, files: dict, hashed: list[str], on_read: Any) -> None:
        if where.name == "step_4":
            raise manifest.DamagedError(f"{where.parent / unseen} cannot be read (No such file or directory)")
        check(where, files, hashed, on_read)

    if dist.get_rank() == last:
        manifest.check_files = check_with_a_hole
    other = SmallRun(Path(folder) / "run", seed=9, resume="auto", **kind)
    out["hole"] = everyone(other.choice.message)
    out["from_step"] = everyone(other.step)
    manifest.check_files = check
    trained = trained[:2] + other.train(3)
    out["expected"], out["trained"] = expected, trained
    out["digests"] = [whole.digest(), other.digest()]

    # Another layout asked for by one rank alone would be a fault of the program; another dataset by all is a refusal on all.
    other.manager._chooser.identity = replace(other.manager.identity, data="other data")
    try:
        out["refusal"] = everyone(other.manager.choose("auto").message)
    except ValueError as error:
        out["refusal"] = everyone(str(error))
    return out


def unusable_shard(folder: str) -> list[str]:
    """ZeRO 3, whose loading ends in a collective: what each rank says where rank 1's shard has right sums and holds NaN."""
    kind: dict[str, Any] = {"stage": 3, "dtype": "float32", "ep": 1}
    run = SmallRun(folder, **kind)
    run.train(1)
    path = run.save()
    dist.barrier()
    if dist.get_rank() == 0:
        (shard,) = path.glob("*zero_pp_rank_1_*optim_states.pt")
        content = load_file(shard, mmap=False)
        content["optimizer_state_dict"]["fp32_flat_groups"][0].data[0] = np.nan
        replace_file(path, shard.name, content)
    dist.barrier()
    try:
        SmallRun(folder, seed=9, resume="auto", **kind)
    except UserError as error:
        return everyone(str(error))
    return everyone("loaded")


def save_and_die(folder: str, rank: int, phase: str) -> None:
    """Save step 2, then have `rank` killed at a phase of saving step 3; the others must end by themselves."""
    run = SmallRun(folder, stage=2, dtype="float32", ep=2)
    run.train(2)
    run.save()
    run.train(1)

    def die(now: str) -> None:
        if dist.get_rank() == rank and now == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    run.manager._on_phase = die
    run.save()


def go_on(folder: str, stage: int, dtype: str, ep: int, steps: int) -> list[list[float]]:
    run = SmallRun(folder, stage=stage, dtype=dtype, ep=ep, resume="auto")
    return [[run.step], *run.train(steps)]


def convert_and_tell(folder: str, started: str) -> None:
    """Resume in another layout, telling by a file when the conversion has begun."""
    run = SmallRun(folder, stage=2, dtype="float32", ep=1, expert_dropout=0.0)
    run.manager._on_phase = lambda phase: Path(started).touch() if phase.startswith("converting") else None
    run.restore(run.manager.choose("auto"))


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    answer = arguments.pop("answer")
    start(timeout=120)
    torch.compiler.set_stance("force_eager")  # Muon's step would be compiled for most of the time; ../test_strategies.py has it so
    result = globals()[name](**arguments)
    if dist.get_rank() == 0:
        Path(answer).write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.ERROR)
    main()
