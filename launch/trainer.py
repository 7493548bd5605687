"""The training loop.

A position in the run is two integers, the optimizer step and the number of samples consumed; the batch of a step is a pure
function of the samples consumed, whatever the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from data.dataset import PackedDataset
from launch.arguments import TrainArguments
from launch.checkpoint import CheckpointManager, TrainingState
from launch.distributed import AgreedError
from launch.guard import SpikeGuard
from launch.monitor import Monitor
from launch.step_guard import StepGuard
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from model.balance import LoadBalancer

Batch = dict[str, torch.Tensor]
#: To the same checkpoint; then the run ends, for it would never come past the place.
ROLLBACKS = 3


@dataclass(kw_only=True)
class Position:
    """Where a run is. `bad_evaluations`: those in a row without a new best."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_loss: float | None = None
    bad_evaluations: int = 0
    wandb_id: str = ""


@dataclass(kw_only=True)
class Trainer:
    """Trains `engine` from `position` to `last_step`. Collective: every rank runs the same steps."""

    arguments: TrainArguments
    engine: DeepSpeedEngine
    step_guard: StepGuard
    train_data: PackedDataset
    validation_data: PackedDataset | None
    balancer: LoadBalancer
    checkpoints: CheckpointManager
    monitor: Monitor
    guard: SpikeGuard
    stop: StopRequest
    watchdog: Watchdog
    last_step: int
    flops_per_token: float
    peak_flops: float | None
    position: Position = field(default_factory=Position)
    outcome: str = ""

    def __post_init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.engine.gradient_accumulation_steps()
        self.global_batch = self.engine.train_batch_size()
        self.device = self.engine.device
        self._saved_at = self._saved_before = self.position.step if self.position.step else -1
        self._saving, self._save_started = "", 0.0
        self._save_error: AgreedError | None = None
        self._rolled_back: list[int] = []
        self._timer = StepTimer()

    def train(self) -> str:
        """Run to the end, a stop request or early stopping; returns the outcome in words."""
        args = self.arguments
        if args.eval_interval and self.position.step == 0:
            self.evaluate()  # where the curve begins
        while self.position.step < self.last_step and not self.outcome:
            self._timer.start()
            metrics = self.train_step()
            self._timer.stop()
            step = self.position.step
            if step % args.log_interval == 0 or step == self.last_step or "skipped" in metrics:
                self.log(metrics)
            if args.eval_interval and (step % args.eval_interval == 0 or step == args.max_steps):
                self.evaluate()
            if step % args.save_interval == 0:
                self.save()
        if self.position.step != self._saved_at:
            self.save()
        self.settle()
        if self._save_error is not None:
            raise self._save_error  # nothing must end with exit code 0 unsaved
        return self.outcome or "finished"

    # ------------------------------------------------------------------ one step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch; returns its metrics (the same on every rank)."""
        batches, targets = self.next_batches()
        # Sum of token losses over this number = the micro-batch's share of the mean over all targets of the global batch,
        # once DeepSpeed has averaged over micro-batches and ranks.
        items = targets / (self.accumulation * self.world_size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.watchdog.at(self.position.step, "forward")
            loss = self.engine(**batch, num_items_in_batch=items).loss
            self.watchdog.at(self.position.step, "backward")
            self.engine.backward(loss)
            total += loss.detach()
            if number < self.accumulation - 1:
                self.engine.step()  # only counts: not a boundary
        loss = self.agree(total)
        self.watchdog.at(self.position.step, "optimizer step")
        reason = self.step_guard.step(lambda grad_norm: self.guard.verdict(loss, grad_norm))
        return self.account(loss, targets, reason)

    def next_batches(self) -> tuple[list[Batch], int]:
        """This rank's micro-batches of the step, and the number of targets in the whole global batch."""
        self.watchdog.at(self.position.step, "loading data")
        batches = []
        for number in range(self.accumulation):
            first = self.position.samples + (number * self.world_size + self.rank) * self.micro_batch
            batch = self.train_data.batch(range(first, first + self.micro_batch))
            batches.append({k: v.to(self.device, non_blocking=True) for k, v in batch.items()})
        if not self.arguments.document_mask:
            return batches, self.global_batch * self.arguments.sequence_length
        targets = torch.stack([(b["shift_labels"] != -100).sum() for b in batches]).sum()
        dist.all_reduce(targets)
        return batches, int(targets)

    def agree(self, loss_sum: torch.Tensor) -> float:
        """The step's global loss; on the way, whether any rank was asked to stop, so that all stop after this step, and
        whether all have written a checkpoint that was saved in the background, so that a failure is heard of at once."""
        self.watchdog.at(self.position.step, "all-reduce of the loss")
        flags = [float(self.stop.requested()), float(self.checkpoints.written())]
        numbers = torch.cat([loss_sum.reshape(1), loss_sum.new_tensor(flags)])
        dist.all_reduce(numbers)
        loss, asked, written = numbers.tolist()
        if asked:
            self.outcome = f"stopped by {self.stop.reason or 'another rank'}"
        if written == self.world_size:
            self.settle()
        return loss / (self.accumulation * self.world_size)

    def account(self, loss: float, targets: int, reason: str | None) -> dict[str, Any]:
        """Move the position past the batch, update the balance or count the skipped step."""
        first_sample = self.position.samples
        self.position.step += 1
        self.position.samples += self.global_batch
        self.position.tokens += self.global_batch * self.arguments.sequence_length
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": self.step_guard.grad_norm}
        if reason is None:
            self.guard.accept(loss, self.step_guard.grad_norm)
            metrics.update(self.balancer.step())
            return metrics
        self.balancer.reset()
        metrics.update(skipped=reason, skipped_samples=[first_sample, self.position.samples])
        self.monitor.say(
            f"step {self.position.step} skipped, weights unchanged: {reason} "
            f"(samples {first_sample} to {self.position.samples - 1})"
        )
        if self.guard.skip():
            self.roll_back(finite=math.isfinite(loss) and math.isfinite(self.step_guard.grad_norm))
        return metrics

    def roll_back(self, *, finite: bool) -> None:
        """Return to the last checkpoint before these steps, keeping the data position: their batches are not seen again."""
        self.settle()
        verdict = self.checkpoints.latest(before=self.position.step - self.guard.skipped_in_a_row + 1)
        often = verdict is not None and self._rolled_back.count(verdict.state.step) >= ROLLBACKS
        if finite and verdict is None:
            self.monitor.say("there is no checkpoint to roll back to: spikes are judged anew from here on")
            self.guard.forget()
            return
        if verdict is None or often:
            why = f"{ROLLBACKS} times back at step {verdict.state.step}" if verdict else "there is no checkpoint to roll back to"
            raise AgreedError(
                f"{self.guard.skipped_in_a_row} steps in a row were skipped and {why}; lower the learning rate, or set "
                "--spike_sigma 0 to train on regardless of spikes"
            )
        self._rolled_back.append(verdict.state.step)
        samples, skipped = self.position.samples, self.guard.skipped_in_all
        self.restore(self.checkpoints.load(self.engine, verdict))
        self.position.samples, self.guard.skipped_in_all, self.guard.skipped_in_a_row = samples, skipped, 0
        self._saved_at = -1
        self.monitor.say(f"rolled back to step {self.position.step}; going on with sample {samples}")

    # ------------------------------------------------------------------ evaluation, logs, checkpoints

    def evaluate(self) -> float | None:
        """Mean loss over the same validation samples at every call and for any number of ranks."""
        if self.validation_data is None:
            return None
        samples = min(len(self.validation_data), self.arguments.eval_batches * self.global_batch)
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for number, batch in enumerate(self.validation_batches(samples)):
                self.watchdog.at(self.position.step, f"evaluation, batch {number}")
                loss = self.engine(**batch, num_items_in_batch=1).loss
                sums += torch.stack([loss.double(), (batch["shift_labels"] != -100).sum().double()])
        self.engine.train()
        dist.all_reduce(sums)
        total, targets = sums.tolist()
        self.judge(total / targets)
        return total / targets

    def validation_batches(self, samples: int) -> Iterator[Batch]:
        """This rank's share in micro-batches. Every rank yields equally many (under expert parallelism a forward pass is
        collective); what stands past the end is there for its shape and has no targets."""
        assert self.validation_data is not None
        for first in range(self.rank * self.micro_batch, samples + self.rank * self.micro_batch, self._stride):
            wanted = range(first, first + self.micro_batch)
            batch = self.validation_data.batch([min(i, samples - 1) for i in wanted])
            batch["shift_labels"][[i >= samples for i in wanted]] = -100
            yield {k: v.to(self.device) for k, v in batch.items()}

    @property
    def _stride(self) -> int:
        return self.micro_batch * self.world_size

    def judge(self, loss: float) -> None:
        """Log a validation loss, keep the best checkpoint, count towards `--patience`."""
        position = self.position
        bits = loss / math.log(2) / self.validation_data.text_bytes_per_token
        self.monitor.log({"step": position.step, "val_loss": loss, "val_bits_per_byte": bits})
        self.monitor.say(f"step {position.step}  validation loss {loss:.4f}  {bits:.4f} bits per byte")
        if position.best_loss is None or loss < position.best_loss:
            position.best_loss, position.bad_evaluations = loss, 0
            if position.step:
                self.save(is_best=True)
            return
        position.bad_evaluations += 1
        if self.arguments.patience and position.bad_evaluations >= self.arguments.patience:
            self.outcome = self.outcome or f"stopped early: {position.bad_evaluations} evaluations without a new best"

    def log(self, metrics: dict[str, Any]) -> None:
        position, seconds, steps = self.position, *self._timer.take()
        speed = steps * self.global_batch * self.arguments.sequence_length / seconds if seconds else 0.0
        row = {"step": position.step, "samples": position.samples, "tokens": position.tokens, **metrics}
        row.update(lr=self.engine.get_lr()[0], tokens_per_second=speed)
        if self.peak_flops:
            row["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.world_size)
        self.monitor.log(row)
        shown = {"loss": f"{row['loss']:.4f}", "norm": f"{row['grad_norm']:.2f}", "lr": f"{row['lr']:.2e}"}
        shown["tokens/s"] = f"{speed:,.0f}"
        if row.get("load_max_over_mean"):
            shown["load"] = f"{max(row['load_max_over_mean']):.2f}"
        self.monitor.progress(position.step, shown, force=position.step == self.last_step)

    def state(self) -> TrainingState:
        position = self.position
        extra = {
            "bad_evaluations": position.bad_evaluations,
            "wandb_id": position.wandb_id,
            "guard": self.guard.state(),
        }
        return TrainingState(
            step=position.step,
            samples=position.samples,
            tokens=position.tokens,
            best_loss=position.best_loss,
            extra=extra,
        )

    def restore(self, state: TrainingState) -> None:
        self.guard.restore(state.extra["guard"])
        self.position = Position(
            step=state.step,
            samples=state.samples,
            tokens=state.tokens,
            best_loss=state.best_loss,
            bad_evaluations=state.extra["bad_evaluations"],
            wandb_id=state.extra["wandb_id"],
        )
        self._saved_at = state.step

    def save(self, *, is_best: bool = False) -> None:
        """A checkpoint of now. In the background (`--async_save`) training goes on when the state is copied; see `settle`."""
        if self._saved_at == self.position.step and not is_best:
            return
        self.watchdog.at(self.position.step, "saving")
        self.settle()
        started = time.monotonic()
        self._saved_before, self._saved_at = self._saved_at, self.position.step
        try:
            self._saving = self.checkpoints.save(self.engine, self.state(), is_best=is_best).name
        except AgreedError as error:
            self._fail_to_save(error)
            return
        self.monitor.log({"step": self.position.step, "save_seconds": time.monotonic() - started})
        self._save_started = started
        if not self.checkpoints.background:
            self.settle()

    def settle(self) -> None:
        """The end of the save that is under way, if there is one: waits for it and says how it went. Collective."""
        if not self._saving:
            return
        name, self._saving = self._saving, ""
        try:
            self.checkpoints.wait()
        except AgreedError as error:
            self._fail_to_save(error)
            return
        self._save_error = None
        self.monitor.say(f"step {self.position.step}  saved {name} in {time.monotonic() - self._save_started:.1f} s")

    def _fail_to_save(self, error: AgreedError) -> None:
        """One failed save is said and training goes on to the next: the disk may have been full for a moment. A second in a
        row ends the run."""
        if self._save_error is not None:
            raise error
        self._save_error, self._saved_at = error, self._saved_before
        self.monitor.log({"step": self.position.step, "save_failed": str(error)})
        if not self.outcome and self.position.step < self.last_step:  # else `train` raises it at once
            self.monitor.say(f"warning: step {self.position.step}: {error}; the next save that fails ends the run")


class StepTimer:
    """Seconds and number of the steps since the last `take`; what lies between steps (evaluation, saving) is not counted."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._seconds, self._steps, self._started = clock, 0.0, 0, 0.0

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> None:
        self._seconds += self._clock() - self._started
        self._steps += 1

    def take(self) -> tuple[float, int]:
        taken = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return taken
