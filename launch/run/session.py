"""One run from joining the other ranks to its last checkpoint."""

from __future__ import annotations

import random
import shlex
import socket
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from data.cli import Exit, as_user_error
from data.lock import FolderLock, take_folder
from data.redact import redact
from launch.checkpoint.choose import ResumeChoice, ResumeFrom
from launch.checkpoint.folder import run_of
from launch.checkpoint.identity import RunIdentity, listed
from launch.checkpoint.manager import CheckpointManager
from launch.cli import AgreedError, end_at_once
from launch.engine.build import build_engine, build_model, check_room
from launch.ranks.control_group import ControlGroup
from launch.ranks.join import JOIN_SECONDS, joining_within, start
from launch.ranks.watchdog import Watchdog
from launch.run import folder as run_folder
from launch.run import preflight, rehearsal
from launch.run.arguments import TrainArguments
from launch.run.assemble import begin_records, greet, make_trainer, say_what_to_expect
from launch.run.environment import describe_environment
from launch.run.health import forget_peak, memory_bytes
from launch.run.initial_weights import load_weights
from launch.run.resolve import ResolvedRun
from launch.run.shards_check import sample_of_bytes, verify_everywhere
from launch.run.stop import StopRequest
from launch.run.trainer import Trainer


def run_session(arguments: TrainArguments, run: ResolvedRun, stop: StopRequest) -> int:
    """Collective. Returns the exit code. A rank that fails says where before it ends, and ends at once."""
    watchdog = Watchdog(stall=arguments.stall_timeout)
    try:
        return Session(arguments, run, stop, watchdog).run_to_end()
    except AgreedError:
        raise
    except BaseException as error:
        mistake = as_user_error(error)
        if mistake is None or watchdog.training:
            watchdog.report(error)
        watchdog.leave_last_words(mistake)  # the others name this rank; what the user can change is one sentence here
        raise mistake from error


@dataclass
class Session:
    """The steps of a run, in the order in which `run_to_end` takes them; each says why it stands where it does. Collective."""

    arguments: TrainArguments
    run: ResolvedRun
    stop: StopRequest
    watchdog: Watchdog
    lock: FolderLock | None = None
    memory_before: float = 0.0  # bytes, before there was an engine

    def run_to_end(self) -> int:
        ranks = self.join()
        identity = identify(self.arguments, self.run)
        self.check(ranks, identity)
        checkpoints, choice = self.choose_checkpoint(identity)
        changes = self.compare_settings(choice, ranks)
        engine = self.build(choice, ranks)
        config = self.describe(identity)
        goes_on = isinstance(choice, ResumeFrom) and choice.is_own
        if not goes_on:
            self.publish_config(config, ranks)
        trainer = self.prepare(engine, checkpoints, choice)
        self.watch_folder(trainer, checkpoints, config)
        if changes:
            trainer.monitor.say(f"changed since this checkpoint's run, and used from the first step on: {listed(changes, 8)}")
        if isinstance(choice, ResumeFrom) and trainer.judging.was_judged_on_others(choice.state):
            trainer.monitor.say("the validation samples are others than this checkpoint's run had: the best is looked for anew")
        self.rehearse(trainer, ranks, config)
        # No sooner: a start that ends for want of memory has left no branch, and taken no row out of the metrics.
        if goes_on:  # with which the next start compares its settings
            self.publish_config(config, ranks)
        if isinstance(choice, ResumeFrom):
            checkpoints.begin(choice)
        if left := checkpoints.left_hint():
            trainer.monitor.say(left)
        begin_records(trainer, choice, config)
        outcome = trainer.train()
        return self.finish(trainer, outcome)

    def join(self) -> ControlGroup:
        """First of all: from here on one rank can speak for all, and a rank that hangs or dies is named.

        The empty `run_everywhere` is where a rank that refuses its own input says so (`refuse_together`): the others meet it
        there before they do anything.
        """
        with joining_within(min(JOIN_SECONDS, self.arguments.stall_timeout)):
            # Longer than the watchdog waits: it names a culprit, and a timeout of the process group does not.
            start(timeout=2 * self.arguments.stall_timeout + 60)
            ranks = ControlGroup()
            ranks.run_everywhere(lambda: None)
            self.watchdog.start()
        self.stop.joined()
        return ranks

    def check(self, ranks: ControlGroup, identity: RunIdentity) -> None:
        """What can be refused without an engine, which takes minutes to build for a large model.

        The lock comes before anything is written or compared in the folder, and on rank 0 alone: it belongs to a process, and
        any other rank would find it taken. The shards are verified before the folder is looked at, since damage there makes
        every comparison moot.
        """
        ranks.run_on_rank0(self.take_folder)
        self.watchdog.phase("preflight")
        same: dict[str, Any] = {"model, data and DeepSpeed JSON": [identity.to_json(), self.run.deepspeed]}
        judged = {f"--eval_tasks {name}": data for name, data in self.run.task_data.items()}
        if self.run.validation_data is not None:
            judged["the validation split"] = self.run.validation_data
        same["the shards' bytes"] = sample_of_bytes(self.run.train_data)
        same |= {f"the shards of {name}": [data.fingerprint, sample_of_bytes(data)] for name, data in judged.items()}
        same.update({f"--{name}": value for name, value in self.arguments.as_json().items()})
        preflight.check(ranks, self.arguments.output, same)
        if self.arguments.verify:
            verifying = partial(self.watchdog.phase, "verifying the shards")
            verifying()
            verify_everywhere(self.run.train_data, ranks, verifying)
        ranks.run_on_rank0(lambda: run_folder.check_same_run(self.arguments.output, identity))

    def take_folder(self) -> None:
        self.lock = take_folder(self.arguments.output, "run")

    def choose_checkpoint(self, identity: RunIdentity) -> tuple[CheckpointManager, ResumeChoice]:
        """Before the engine, which is initialised otherwise for a checkpoint that must be converted."""
        checkpoints = CheckpointManager(
            self.arguments.output,
            keep_last=self.arguments.keep_last,
            keep_every=self.arguments.keep_every,
            identity=identity,
            background=self.arguments.async_save,
            on_phase=self.watchdog.phase,
        )
        return checkpoints, checkpoints.choose(self.arguments.resume)

    def compare_settings(self, choice: ResumeChoice, ranks: ControlGroup) -> list[str]:
        """What JSON and flags say otherwise than when the checkpoint was made. Before `publish_config` writes over it."""
        if not isinstance(choice, ResumeFrom):
            return []
        folder, deterministic = run_of(choice.path), self.arguments.deterministic
        return ranks.run_on_rank0(lambda: run_folder.changed_settings(folder, self.run.deepspeed, deterministic=deterministic))

    def build(self, choice: ResumeChoice, ranks: ControlGroup) -> DeepSpeedEngine:
        """The weights depend on the seed alone and are the same on all ranks; what is drawn after them (dropout) may differ."""
        self.watchdog.phase("building the engine")
        self.memory_before = memory_bytes()
        arguments = self.arguments
        ranks.run_everywhere(lambda: check_room(self.run.model, self.run.strategy.ep_size))
        model = build_model(self.run.model, seed=arguments.seed, attn_implementation=arguments.attn_implementation)
        source = arguments.init_from
        if source is not None and not isinstance(choice, ResumeFrom):
            ranks.run_everywhere(lambda: load_weights(model, source))
        engine = build_engine(model, choice.deepspeed_config(self.run.deepspeed))
        seed = arguments.seed + 1 + dist.get_rank()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return engine

    def describe(self, identity: RunIdentity) -> dict[str, Any]:
        """For config.json."""
        return {
            **identity.to_json(),
            "sources": self.run.train_data.describe(),
            "validation": self.run.validation_data.describe() if self.run.validation_data else None,
            "deepspeed": self.run.deepspeed,
            "arguments": self.arguments.as_json(),
            **describe_environment(),
        }

    def publish_config(self, config: dict[str, Any], ranks: ControlGroup) -> None:
        """After the engine stands: a folder whose settings never made an engine is not yet a run."""
        tokenizer = self.run.train_data.tokenizer_folder
        ranks.run_on_rank0(lambda: run_folder.write_config(self.arguments.output, config, tokenizer))

    def prepare(self, engine: DeepSpeedEngine, checkpoints: CheckpointManager, choice: ResumeChoice) -> Trainer:
        """Load what was chosen, last of all that reads: nothing after it may change the weights or draw random numbers."""
        trainer = make_trainer(self.arguments, self.run, engine, checkpoints, self.stop, self.watchdog)
        if isinstance(choice, ResumeFrom):
            trainer.restore(trainer.saving.load(choice))
            if not choice.is_own:  # or it would write into the other run's curves
                trainer.position.wandb_id = ""
        trainer.position.wandb_id = trainer.position.wandb_id or uuid.uuid4().hex[:12]
        greet(trainer, self.run, choice)
        return trainer

    def watch_folder(self, trainer: Trainer, checkpoints: CheckpointManager, config: dict[str, Any]) -> None:
        """Before every save: where the folder was deleted meanwhile, say so, and make it a run's folder again."""
        output, watch = self.arguments.output, run_folder.FolderWatch(self.arguments.output)

        def look() -> None:
            if not watch.is_lost():
                return
            if self.lock is not None:
                self.lock.release()
                self.lock = None
            self.lock = take_folder(output, "run")
            run_folder.check_not_anothers(output, config)
            run_folder.write_config(output, config, self.run.train_data.tokenizer_folder)
            watch.begin_anew()  # not before: what is refused at this save is refused at the next
            trainer.monitor.say(
                f"warning: {output} was deleted, moved or replaced while the run goes on, and what it held is not there any more; "
                "config.json and the tokenizer are written anew, and metrics and checkpoints go on there"
            )

        checkpoints.before_save = look

    def rehearse(self, trainer: Trainer, ranks: ControlGroup, config: dict[str, Any]) -> None:
        """With the run's own next batch, so after the position is known. From then on an error is no mistake in the input."""
        self.watchdog.phase("preflight: one step at full size")
        forget_peak()
        rehearsal.rehearse(trainer, ranks)
        hosts = ranks.gather(socket.gethostname())  # not the GPUs that this rank sees, which may be its own alone
        say_what_to_expect(trainer, config, memory_bytes() - self.memory_before, ranks_per_node=hosts.count(hosts[0]))
        self.watchdog.training = True

    def finish(self, trainer: Trainer, outcome: str) -> int:
        """All ranks have saved before any stops listening: only then is a late signal of the launcher without meaning."""
        folder = self.arguments.output
        trainer.monitor.say(f"{outcome} at step {trainer.position.step}; everything lies in {folder}")
        if trainer.profile is not None and trainer.profile.written:
            trainer.monitor.say(f"where a step's time goes: {trainer.profile.folder}/table.txt")
        export = ["python", "launch/export.py", "--checkpoint", str(folder), "--output", f"{folder}-hf"]
        trainer.monitor.say(f"next: {shlex.join(export)}")  # quoted, to be pasted
        clean = trainer.monitor.close()
        self.watchdog.at(trainer.position.step, "waiting for the other ranks to finish")
        dist.barrier()
        self.stop.disarm()
        self.watchdog.stop()
        if self.lock is not None:
            self.lock.release()
        dist.destroy_process_group()
        if not clean:  # W&B hangs, and its own clean-up at the interpreter's exit would wait for minutes
            end_at_once(Exit.DONE)
        return Exit.DONE


def identify(arguments: TrainArguments, run: ResolvedRun) -> RunIdentity:
    """What the run's checkpoints belong to."""
    strategy = run.strategy
    return RunIdentity(
        model=redact(run.model.to_dict()),
        data={"content": run.train_data.fingerprint, "tokenizer": run.train_data.tokenizer_fingerprint},
        sequence_length=arguments.sequence_length,
        global_batch=strategy.train_batch_size,
        seed=arguments.seed,
        document_mask=arguments.document_mask,
        world_size=run.world_size,
        ep_size=strategy.ep_size,
        zero_stage=strategy.zero_stage,
        dtype=strategy.dtype,
    )
