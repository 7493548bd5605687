"""The trainer of a run out of its parts, and what the run says of itself before the first step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from data.cli import counted
from data.dataset import PackedDataset
from launch.checkpoint.choose import ResumeChoice, ResumeFrom
from launch.checkpoint.manager import CheckpointManager
from launch.engine.build import group_hint
from launch.engine.hardware import bf16_hint, gpu_name
from launch.engine.regions import compile_hint
from launch.engine.settings import EngineSettings
from launch.engine.step_hook import StepHook
from launch.engine.strategy import schedule_hint
from launch.planning.devices import device_of
from launch.planning.expectation import duration_line, job_of_run, memory_line
from launch.profiling.ranges import STEP
from launch.ranks.watchdog import Watchdog
from launch.run.arguments import TrainArguments
from launch.run.checkpoint_eval import CheckpointEvaluator
from launch.run.health import Health
from launch.run.judging import Judging
from launch.run.metrics import Monitor
from launch.run.profile import StepProfile
from launch.run.resolve import ResolvedRun
from launch.run.saving import Saving
from launch.run.spikes import SpikeDetector
from launch.run.stop import StopRequest
from launch.run.trackers import Tracked
from launch.run.trainer import Trainer
from launch.run.validation import Validation
from model.accounting import count_parameters, training_flops_per_token
from model.balance import LoadBalancer


def make_trainer(
    arguments: TrainArguments,
    run: ResolvedRun,
    engine: DeepSpeedEngine,
    checkpoints: CheckpointManager,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Trainer:
    last_step = min(arguments.max_steps, arguments.stop_after or arguments.max_steps)
    monitor = Monitor(arguments.output, enabled=dist.get_rank() == 0, last_step=last_step)
    evaluator = CheckpointEvaluator(
        output=arguments.output, files=run.task_files, problems=arguments.eval_problems, monitor=monitor
    )
    judging = make_judging(arguments, run, engine, monitor, watchdog)
    clip = run.strategy.gradient_clipping
    device = device_of(gpu_name())
    trainer = Trainer(
        arguments=arguments,
        engine=engine,
        step_hook=StepHook(engine, clip=clip),
        health=Health(clip=clip, interval=arguments.health_interval),
        train_data=run.train_data,
        judging=judging,
        balancer=LoadBalancer.of(run.model, engine.module, dist.all_reduce),
        evaluator=evaluator,
        saving=Saving(
            engine=engine,
            settings=EngineSettings(engine),
            checkpoints=checkpoints,
            monitor=monitor,
            on_saved=evaluator.begin,
            on_best_lost=judging.take_back,
            on_best_again=judging.give_back,
        ),
        monitor=monitor,
        spikes=SpikeDetector(sigma=arguments.spike_sigma, window=arguments.spike_window, rollback_after=arguments.spike_rollback),
        stop=stop,
        watchdog=watchdog,
        last_step=last_step,
        flops_per_token=training_flops_per_token(run.model, arguments.sequence_length),
        peak_flops=device.peak if device else None,
    )
    if arguments.profile:
        trainer.profile = make_profile(trainer)
    return trainer


def make_profile(trainer: Trainer) -> StepProfile:
    """What of a step is no module of the model is named here."""
    methods = [
        (trainer, "next_batches", "data"),
        (trainer, "reduce_loss_and_flags", "communication"),
        (trainer.balancer, "step", "router"),
        (trainer.step_hook, "step", "optimizer"),
        (trainer.engine, "backward", "gradients"),
        (trainer, "train_step", STEP),
    ]
    return StepProfile(trainer.arguments.output, trainer.arguments.profile, trainer.engine.module, methods, trainer.monitor)


def make_judging(
    arguments: TrainArguments, run: ResolvedRun, engine: DeepSpeedEngine, monitor: Monitor, watchdog: Watchdog
) -> Judging:
    def validation(data: PackedDataset) -> Validation:
        samples = min(len(data), arguments.eval_batches * engine.train_batch_size())
        return Validation(engine=engine, data=data, samples=samples, on_phase=watchdog.phase)

    return Judging(
        validation=validation(run.validation_data) if run.validation_data is not None else None,
        tasks={name: validation(data) for name, data in run.task_data.items()},
        patience=arguments.patience,
        monitor=monitor,
        watchdog=watchdog,
    )


def too_short_hint(data: PackedDataset) -> str | None:
    """Of folders beside others: one by itself, or with a weight, is refused."""
    needed = data.sequence_length + 1
    if short := [f"{stream.folder} ({stream.tokens:,} tokens)" for stream in data.too_short]:
        return f"warning: a sample needs {needed:,} tokens, so the {data.split} split of these gives none: {', '.join(short)}"
    return None


def when_saved(save_interval: int, *, evaluates: bool) -> str:
    """Those of a new best push none of the others out: see `CheckpointFolder.expendable`."""
    return f"a checkpoint every {save_interval:,}" + (" and at each new best validation loss" if evaluates else "")


def greet(trainer: Trainer, run: ResolvedRun, choice: ResumeChoice) -> None:
    """The first lines: what is trained, on what, from where."""
    arguments, monitor = trainer.arguments, trainer.monitor
    counts = count_parameters(run.model)
    monitor.say(
        f"{arguments.model}: {counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active; "
        f"{counted(run.world_size, 'rank')}, expert parallel {run.strategy.ep_size}, ZeRO {run.strategy.zero_stage}, "
        f"{run.strategy.dtype}"
    )
    samples = len(run.train_data)
    tokens = trainer.global_batch * arguments.sequence_length
    monitor.say(
        f"{samples:,} samples of {arguments.sequence_length:,} tokens; {tokens:,} tokens a step, "
        f"{arguments.max_steps * trainer.global_batch / samples:,.2f} epochs in {arguments.max_steps:,} steps, "
        f"{when_saved(arguments.save_interval, evaluates=run.validation_data is not None)}"
    )
    hints = (
        compile_hint(run.strategy),
        group_hint(run.model),
        bf16_hint(run.strategy.dtype),
        schedule_hint(trainer.engine.lr_scheduler, arguments.max_steps),
        *(too_short_hint(data) for data in (run.train_data, run.validation_data) if data),
    )
    for warning in filter(None, hints):
        monitor.say(warning)
    monitor.say(choice.message)


def begin_records(trainer: Trainer, choice: ResumeChoice, config: dict[str, Any]) -> None:
    """`metrics.jsonl` and the trackers, from the first step on: rows that will be written again move away."""
    arguments, monitor = trainer.arguments, trainer.monitor
    monitor.begin(trainer.position.step, trainer.position.samples)
    if isinstance(choice, ResumeFrom):
        monitor.log({"step": trainer.position.step, "resumed": choice.message})
    tracked = Tracked(
        folder=arguments.output,
        project=arguments.wandb_project,
        run_id=trainer.position.wandb_id,
        config=config,
        first_step=trainer.position.step,
        wandb_mode=arguments.wandb,
    )
    monitor.start_trackers(arguments.tracker, tracked, detailed=arguments.tracker_detail == "detailed")


def say_what_to_expect(trainer: Trainer, config: dict[str, Any], measured: float, *, ranks_per_node: int) -> None:
    """After the rehearsal: what it took beside the plan's figure, and the plan's time for the rest."""
    on_gpu = trainer.device.type == "cuda"
    job = job_of_run(config, ranks_per_node=ranks_per_node)
    trainer.monitor.say(memory_line(job, measured, on_gpu=on_gpu))
    steps, arguments = range(trainer.position.step, trainer.last_step), trainer.arguments
    evaluated = arguments.eval_interval if trainer.judging.validation is not None else 0
    expected = duration_line(job, gpu_name(), steps, save_interval=arguments.save_interval, eval_interval=evaluated)
    if expected is not None:
        trainer.monitor.say(expected)
