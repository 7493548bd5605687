"""One run from joining the other ranks to its last checkpoint."""

from __future__ import annotations

import json
import os
import random
import uuid
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from data.verify import verify
from launch import preflight, run_folder
from launch.agreement import Agreement
from launch.arguments import TrainArguments
from launch.checkpoint import CheckpointManager, Verdict
from launch.deepspeed_config import expert_parallel_size, lookup
from launch.distributed import JOIN_SECONDS, start, within
from launch.engine import build_engine, build_model, peak_flops
from launch.errors import USER_ERRORS
from launch.guard import SpikeGuard
from launch.monitor import Monitor
from launch.step_guard import StepGuard
from launch.stop import StopRequest
from launch.trainer import Position, Trainer
from launch.watchdog import Watchdog
from model.accounting import count_parameters, training_flops_per_token
from model.balance import LoadBalancer

if TYPE_CHECKING:
    from launch.train import Plan


def run_session(arguments: TrainArguments, plan: Plan, stop: StopRequest) -> int:
    """Collective. Returns the exit code. A rank that fails says where before it ends, and ends at once."""
    watchdog = Watchdog(stall=arguments.stall_timeout)
    try:
        return _run(arguments, plan, stop, watchdog)
    except USER_ERRORS as error:
        if not getattr(error, "agreed", False):
            if watchdog.training:
                watchdog.report(error)
            watchdog.tell(error)  # the others name this rank; what the user can change is one sentence here
        raise
    except BaseException as error:
        watchdog.report(error)


def _run(arguments: TrainArguments, plan: Plan, stop: StopRequest, watchdog: Watchdog) -> int:
    with within(min(JOIN_SECONDS, arguments.stall_timeout), "all ranks to join"):
        # Longer than the watchdog waits: it names a culprit, and a timeout of the process group does not.
        start(timeout=2 * arguments.stall_timeout + 60)
        ranks = Agreement()
        ranks.on_all(lambda: None)  # a rank that refuses its own input says so here: `refuse_together`
        watchdog.start()
    folder_lock = run_folder.FolderLock(arguments.output)
    ranks.on_first(folder_lock.take)
    identity = identify(arguments, plan)
    watchdog.phase("preflight")
    preflight.check(
        ranks,
        arguments.output,
        {"model, data and DeepSpeed JSON": [identity, plan.deepspeed], **same_on_all(arguments)},
    )
    if arguments.verify:
        watchdog.phase("verifying the shards")
        ranks.on_first(lambda: verify_shards(plan))
    ranks.on_first(lambda: run_folder.check_same_run(arguments.output, identity))
    checkpoints = CheckpointManager(
        arguments.output,
        keep_last=arguments.keep_last,
        keep_every=arguments.keep_every,
        identity=identity,
        background=arguments.async_save,
        on_phase=watchdog.phase,
    )
    verdict = checkpoints.find(arguments.resume)
    watchdog.phase("building the engine")
    engine = start_engine(arguments, plan, verdict, ranks)
    config = {
        **identity,
        "sources": plan.train_data.describe(),
        "deepspeed": plan.deepspeed,
        "arguments": arguments.as_json(),
        **run_folder.describe_environment(),
    }
    ranks.on_first(lambda: run_folder.write_config(arguments.output, config, plan.train_data.tokenizer_folder))
    trainer = make_trainer(arguments, plan, engine, checkpoints, stop, watchdog)
    if verdict.resumes:
        trainer.restore(checkpoints.load(engine, verdict))
    trainer.position.wandb_id = trainer.position.wandb_id or uuid.uuid4().hex[:12]
    greet(trainer, plan, verdict, config)
    watchdog.phase("preflight: one step at full size")
    preflight.rehearse(trainer, ranks)
    watchdog.training = True
    outcome = trainer.train()
    trainer.monitor.say(f"{outcome} at step {trainer.position.step}; everything lies in {arguments.output}")
    clean = trainer.monitor.close()
    watchdog.at(trainer.position.step, "waiting for the other ranks to finish")
    dist.barrier()
    stop.disarm()
    watchdog.stop()
    folder_lock.release()
    dist.destroy_process_group()
    if not clean:
        os._exit(0)
    return 0


def same_on_all(arguments: TrainArguments) -> dict[str, Any]:
    """The arguments that must not differ between ranks, which is all of them."""
    return {f"--{name}": value for name, value in arguments.as_json().items()}


def refuse_together(error: Exception) -> NoReturn:
    """End all ranks with the error that this one found before it joined them; rank 0 speaks where all found the same."""

    def give_reason() -> None:
        raise error

    with within(JOIN_SECONDS, "all ranks to join"):
        start(timeout=JOIN_SECONDS)
        Agreement().on_all(give_reason)
    raise error


def identify(arguments: TrainArguments, plan: Plan) -> dict[str, Any]:
    """What a checkpoint belongs to. `find` refuses one whose model, data or batch differs and converts another layout."""
    bf16 = lookup(plan.deepspeed, "bf16.enabled", False)
    identity = {
        "model": plan.model.to_dict(),
        "data": {"content": plan.train_data.fingerprint, "tokenizer": plan.train_data.tokenizer_fingerprint},
        "sequence_length": arguments.sequence_length,
        "global_batch": plan.deepspeed["train_batch_size"],
        "seed": arguments.seed,
        "document_mask": arguments.document_mask,
        "world_size": plan.world_size,
        "ep_size": expert_parallel_size(plan.deepspeed),
        "zero_stage": lookup(plan.deepspeed, "zero_optimization.stage", 0),
        "dtype": "bfloat16" if bf16 else "float16" if lookup(plan.deepspeed, "fp16.enabled", False) else "float32",
    }
    return json.loads(json.dumps(identity))  # as it reads back: keys are strings, tuples are lists


def start_engine(arguments: TrainArguments, plan: Plan, verdict: Verdict, ranks: Agreement) -> DeepSpeedEngine:
    model = build_model(plan.model, seed=arguments.seed, attn_implementation=arguments.attn_implementation)
    if arguments.init_from is not None and not verdict.resumes:
        ranks.on_all(lambda: load_weights(model, arguments.init_from))
    config = verdict.deepspeed_config(plan.deepspeed)
    engine = build_engine(model, config, mode=arguments.activation_checkpointing)
    # After the weights: dropout may differ between ranks, the weights may not.
    seed = arguments.seed + 1 + dist.get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return engine


def verify_shards(plan: Plan) -> None:
    """Every checksum, count and token id of the shards. Errors: `ValueError` with the first fault."""
    faults = [fault for stream in plan.train_data.streams for fault in verify(stream.folder, workers=os.cpu_count() or 1)]
    if faults:
        raise ValueError(f"{faults[0]}" + (f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""))


def load_weights(model: Any, folder: Any) -> None:
    """The weights of an exported folder, every one of them. Errors: `ValueError` with what does not fit."""
    from transformers.utils.logging import disable_progress_bar

    from model import MoEGPTForCausalLM

    if not (folder / "config.json").is_file():
        raise ValueError(f"--init_from {folder} is not an exported model; make one with launch/export.py")
    disable_progress_bar()
    source = MoEGPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"--init_from {folder} does not fit the model: {' '.join(str(error).split())[:300]}") from None


def make_trainer(
    arguments: TrainArguments,
    plan: Plan,
    engine: DeepSpeedEngine,
    checkpoints: CheckpointManager,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Trainer:
    last_step = min(arguments.max_steps, arguments.stop_after or arguments.max_steps)
    clip = lookup(plan.deepspeed, "gradient_clipping", 0.0)
    return Trainer(
        arguments=arguments,
        engine=engine,
        step_guard=StepGuard(engine, clip=clip),
        train_data=plan.train_data,
        validation_data=plan.validation_data,
        balancer=LoadBalancer(engine.module, plan.model.router_bias_rate, all_reduce=dist.all_reduce),
        checkpoints=checkpoints,
        monitor=Monitor(arguments.output, enabled=dist.get_rank() == 0, last_step=last_step),
        guard=SpikeGuard(sigma=arguments.spike_sigma, window=arguments.spike_window, rollback_after=arguments.spike_rollback),
        stop=stop,
        watchdog=watchdog,
        last_step=last_step,
        flops_per_token=training_flops_per_token(plan.model, arguments.sequence_length),
        peak_flops=peak_flops(),
        position=Position(),
    )


def greet(trainer: Trainer, plan: Plan, verdict: Verdict, config: dict[str, Any]) -> None:
    """The first lines: what is trained, on what, from where."""
    arguments, monitor = trainer.arguments, trainer.monitor
    counts = count_parameters(plan.model)
    monitor.say(
        f"{arguments.model}: {counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active; "
        f"{plan.world_size} ranks, expert parallel {config['ep_size']}, ZeRO {config['zero_stage']}, {config['dtype']}"
    )
    samples = len(plan.train_data)
    tokens = trainer.global_batch * arguments.sequence_length
    monitor.say(
        f"{samples:,} samples of {arguments.sequence_length:,} tokens; {tokens:,} tokens a step, "
        f"{arguments.max_steps * trainer.global_batch / samples:,.2f} epochs in {arguments.max_steps:,} steps"
    )
    monitor.say(verdict.message)
    monitor.begin(trainer.position.step)
    monitor.start_wandb(
        arguments.output,
        mode=arguments.wandb,
        project=arguments.wandb_project,
        run_id=trainer.position.wandb_id,
        config=config,
    )
