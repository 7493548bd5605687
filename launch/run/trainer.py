"""The training loop.

A position in the run is two integers, the optimizer step and the number of samples consumed; the batch of a step is a pure
function of the samples consumed, whatever the number of ranks. The order of a step: batches, forward and backward of each, the
loss and the stop flags of all ranks in one all-reduce, the optimizer (or the refusal of the step), the routers' balance.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from data.cli import UserError
from data.dataset import PackedDataset
from launch.checkpoint.state import TrainingState
from launch.cli import AgreedError
from launch.engine.step_hook import StepHook
from launch.engine.update_ratio import UpdateRatio
from launch.ranks.watchdog import Watchdog
from launch.run.arguments import TrainArguments
from launch.run.batches import Batch, BatchLoader, StepBatches
from launch.run.checkpoint_eval import CheckpointEvaluator
from launch.run.health import Health, memory_bytes
from launch.run.judging import Judging
from launch.run.metrics import Monitor
from launch.run.profile import StepProfile
from launch.run.saving import Saving
from launch.run.spikes import SpikeDetector
from launch.run.stop import StopRequest
from launch.words import gigabytes, short
from model.balance import LoadBalancer

#: To the same checkpoint; then the run ends, for it would never come past the place.
ROLLBACKS = 3


@dataclass(kw_only=True)
class Position:
    """Where a run is: fields of `TrainingState`, and of its `extra` the name under which the trackers know the run."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    wandb_id: str = ""


@dataclass(kw_only=True)
class Trainer:
    """Trains `engine` from `position` to `last_step`. Collective: every rank runs the same steps."""

    arguments: TrainArguments
    engine: DeepSpeedEngine
    step_hook: StepHook
    train_data: PackedDataset
    judging: Judging
    evaluator: CheckpointEvaluator
    balancer: LoadBalancer
    health: Health
    saving: Saving
    monitor: Monitor
    spikes: SpikeDetector
    stop: StopRequest
    watchdog: Watchdog
    last_step: int
    flops_per_token: float
    peak_flops: float | None
    profile: StepProfile | None = None
    position: Position = field(default_factory=Position)
    outcome: str = ""

    def __post_init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.engine.gradient_accumulation_steps()
        self.global_batch = self.engine.train_batch_size()
        self.device = self.engine.device
        self.loader = BatchLoader(
            self.train_data,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            device=self.device,
        )
        self._rolled_back: list[int] = []
        self._rollback_due = False
        self._timer, self._shown = StepTimer(), dict[str, str]()

    def train(self) -> str:
        """Run to the end, a stop request or early stopping; returns the outcome in words."""
        args = self.arguments
        if args.eval_interval and self.position.step == 0:
            self.validate()  # where the curve begins
        while self.position.step < self.last_step and not self.outcome:
            self._timer.start()
            metrics = self.train_step()
            seconds = self._timer.stop()
            step = self.position.step
            if self.profile is not None:
                self.profile.after_step(seconds)
            if self.is_logged(step) or "skipped" in metrics:
                self.log(metrics)
                self.evaluator.take(step)
            self.show_progress(metrics)
            if self._rollback_due and self.roll_back(finite=math.isfinite(metrics["loss"] + metrics["grad_norm"])):
                self.save()  # the data position: ended before the next one, a run would meet these batches again
                continue  # these weights were evaluated when they were here first
            if args.eval_interval and (step % args.eval_interval == 0 or step == args.max_steps):
                self.validate()
            if step % args.save_interval == 0:
                self.save()
        if self.profile is not None:
            self.profile.close()
        self.watchdog.at(self.position.step, "saving")
        self.loader.close()
        self.saving.finish(self.position.step, self.state, skipped=self.spikes.skipped_in_a_row)
        self.evaluator.take(self.position.step)
        self.evaluator.leave()
        return self.outcome or "finished"

    # ------------------------------------------------------------------ one step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch; returns its metrics (the same on every rank)."""
        batches, targets = self.next_batches()
        total = self.accumulate(batches, targets)
        loss, rate = self.reduce_loss_and_flags(total), self.engine.get_lr()[0]  # after the step it is the next one's
        self.watchdog.at(self.position.step, "optimizer step")
        ratio = UpdateRatio(self.engine) if self.health.is_detailed(self.position.step + 1) else None
        reason = self.step_hook.step(lambda grad_norm: self.spikes.reason_to_skip(loss, grad_norm))
        metrics = {**self.advance(loss, reason), "lr": rate}
        if ratio is not None and reason is None:
            self.monitor.log({"step": self.position.step, **self.health.snapshot(ratio.measure())})
        return metrics

    def accumulate(self, batches: list[Batch], targets: int, prefix: str = "") -> torch.Tensor:
        """Forward and backward of micro-batches of a step with `targets` in all; returns this rank's sum of their losses.

        prefix: of forward and backward, as the watchdog calls them.
        """
        # Sum of token losses over this number = the micro-batch's share of the mean over all targets of the global batch,
        # once DeepSpeed has averaged over micro-batches and ranks.
        items = targets / (self.accumulation * self.world_size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            self.watchdog.at(self.position.step, f"{prefix}forward")
            loss = self.engine(**batch, num_items_in_batch=items).loss
            self.watchdog.at(self.position.step, f"{prefix}backward")
            self.engine.backward(loss)
            total += loss.detach()
            if batch is not batches[-1]:
                self.engine.step()  # only counts: not a boundary
        return total

    def next_batches(self) -> StepBatches:
        """This rank's micro-batches of the step, and the number of targets in the whole global batch."""
        self.watchdog.at(self.position.step, "loading data")
        with self.health.waiting_for_data():
            return self.loader.step(self.position.samples)

    def reduce_loss_and_flags(self, loss_sum: torch.Tensor) -> float:
        """The step's global loss; on the way, whether any rank was asked to stop, so that all stop after this step, and
        whether all have written a checkpoint that was saved in the background, so that a failure is heard of at once."""
        self.watchdog.at(self.position.step, "all-reduce of the loss")
        flags = (float(self.stop.requested()), float(self.saving.checkpoints.written()))
        numbers = torch.stack([loss_sum, *(torch.full_like(loss_sum, flag) for flag in flags)])  # fills: nothing is copied
        dist.all_reduce(numbers)
        loss, asked, written = numbers.tolist()
        if asked:
            self.outcome = f"stopped by {self.stop.reason or 'another rank'}"
        if written == self.world_size:
            self.saving.finish_pending_save(self.position.step)
        return float(loss / (self.accumulation * self.world_size))

    def advance(self, loss: float, reason_to_skip: str | None) -> dict[str, Any]:
        """Move the position past the batch, update the balance or count the skipped step."""
        first_sample = self.position.samples
        self.position.step += 1
        self.position.samples += self.global_batch
        self.position.tokens += self.global_batch * self.arguments.sequence_length
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": self.step_hook.grad_norm}
        if reason_to_skip is None:
            self.spikes.accept_step(loss, self.step_hook.grad_norm)
            progress = self.position.step / self.arguments.max_steps
            metrics.update(self.balancer.step(measure=self.is_logged(self.position.step), progress=progress))
            self.health.count_step(self.step_hook.grad_norm, self.balancer.load_YE)
            return metrics
        self.balancer.reset()
        self.health.skip_step()
        metrics.update(skipped=reason_to_skip, skipped_samples=[first_sample, self.position.samples])
        self.monitor.say(
            f"step {self.position.step} skipped, weights unchanged: {reason_to_skip} "
            f"(samples {first_sample} to {self.position.samples - 1})"
        )
        rescaling = self.step_hook.overflowed and math.isfinite(loss)
        self._rollback_due = self.spikes.skip_step(in_a_row=not rescaling)  # once the step's row is written, by its own number
        return metrics

    def roll_back(self, *, finite: bool) -> bool:
        """Return to the last checkpoint before these steps, keeping the data position: their batches are not seen again.

        False where there is none and training goes on from here.
        """
        self._rollback_due = False
        self.saving.finish_pending_save(self.position.step)
        found = self.saving.checkpoints.newest(before=self.position.step - self.spikes.skipped_in_a_row + 1)
        often = found is not None and self._rolled_back.count(found.state.step) >= ROLLBACKS
        if finite and found is None:
            self.monitor.say("there is no checkpoint to roll back to: spikes are judged anew from here on")
            self.spikes.forget_history()
            return False
        if found is None or often:
            why = f"{ROLLBACKS} times back at step {found.state.step}" if found else "there is no checkpoint to roll back to"
            or_train_on = ", or set --spike_sigma 0 to train on regardless of spikes" if finite else ""  # NaN is skipped at 0 too
            raise AgreedError(
                f"{self.spikes.skipped_in_a_row} steps in a row were skipped and {why}; lower the learning rate{or_train_on}"
            )
        self._rolled_back.append(found.state.step)
        now, skipped = self.position, self.spikes.skipped_in_all
        self.restore(self.saving.load(found))
        self.position.samples, self.position.tokens, self.position.wandb_id = now.samples, now.tokens, now.wandb_id
        self.spikes.begin_after_rollback(skipped)
        self.saving.saved_at = -1
        self.monitor.count_from(self.position.step)
        self.monitor.say(f"rolled back to step {self.position.step}; going on with sample {now.samples}")
        return True

    # ------------------------------------------------------------------ evaluation, logs, checkpoints

    def validate(self) -> None:
        """Keep the best checkpoint, stop where `--patience` is over; `--eval_tasks` come last."""
        step = self.position.step
        verdict = self.judging.judge(step)
        if verdict.is_best and step:
            self.save(is_best=True)
        self.outcome = self.outcome or verdict.reason_to_stop
        self.judging.measure_tasks(step)

    def is_logged(self, step: int) -> bool:
        return step % self.arguments.log_interval == 0 or step == self.last_step

    def log(self, metrics: dict[str, Any]) -> None:
        position, seconds, steps = self.position, *self._timer.take()
        speed = steps * self.global_batch * self.arguments.sequence_length / seconds if seconds else 0.0
        row = {"step": position.step, "samples": position.samples, "tokens": position.tokens, **metrics}
        row.update(tokens_per_second=speed)
        self.watchdog.at(position.step, "all-reduce of memory and waiting times")
        memory, device = memory_bytes(), self.device
        row.update(self.health.take(loss=metrics["loss"], seconds=seconds, steps=steps, memory=memory, device=device))
        if self.peak_flops:
            row["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.world_size)
        self.monitor.log(row)
        self._shown = {"tokens/s": f"{short(speed)} tok/s"}
        if "mfu" in row:
            self._shown["MFU"] = f"MFU {row['mfu']:.0%}"
        self._shown["memory"] = gigabytes(memory)
        if row.get("max_vio"):
            self._shown["max_vio"] = f"max_vio {max(row['max_vio']):.2f}"

    def show_progress(self, metrics: dict[str, Any]) -> None:
        """At every step: the numbers that every step has, beside the last logged ones."""
        shown = {"loss": f"loss {metrics['loss']:.3f}", "norm": f"norm {metrics['grad_norm']:.2f}"}
        self.monitor.progress(self.position.step, {**shown, **self._shown}, force=self.position.step == self.last_step)

    def save(self, *, is_best: bool = False) -> None:
        self.watchdog.at(self.position.step, "saving")
        step, skipped = self.position.step, self.spikes.skipped_in_a_row
        counted = not is_best or step % self.arguments.save_interval == 0
        self.saving.save(step, self.state, is_best=is_best, counted=counted, skipped=skipped)

    def state(self) -> TrainingState:
        position = asdict(self.position)
        extra = {**self.judging.extra(), "wandb_id": position.pop("wandb_id"), "guard": self.spikes.state()}
        return TrainingState(**position, best_loss=self.judging.best_loss, best_step=self.judging.best_step, extra=extra)

    def restore(self, state: TrainingState) -> None:
        """Raises UserError where the checkpoint's `extra`, which only a trainer's parts know, is not what `state` made of it."""
        try:
            self.spikes.restore(state.extra["guard"])
            self.judging.restore(state)
            wandb_id = _checked_id(state.extra["wandb_id"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"step_{state.step}/state.json: extra is not what a run of this system saves ({type(error).__name__}: {error}); "
                "go on from another checkpoint with --resume"
            ) from error
        self.position = Position(step=state.step, samples=state.samples, tokens=state.tokens, wandb_id=wandb_id)


def _checked_id(wandb_id: str) -> str:
    """W&B makes the names of folders of it. Raises ValueError for what could lead out of them."""
    if not re.fullmatch(r"[\w-]{0,64}", wandb_id, re.ASCII):
        raise ValueError(f"wandb_id {wandb_id[:80]!r}")
    return wandb_id


class StepTimer:
    """Seconds and number of the steps since the last `take`; what lies between steps (evaluation, saving) is not counted."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._seconds, self._steps, self._started = clock, 0.0, 0, 0.0

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> float:
        """Seconds of this step."""
        seconds = self._clock() - self._started
        self._seconds += seconds
        self._steps += 1
        return seconds

    def take(self) -> tuple[float, int]:
        taken = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return taken
