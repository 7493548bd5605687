"""What the trainer computes and decides at a step, an evaluation, a rollback, and what it makes of a checkpoint's state."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scripted_validation import HeardMonitor, ScriptedValidation, judging

from data.dataset import PackedDataset
from launch.checkpoint.state import TrainingState
from launch.cli import AgreedError
from launch.run.batches import BatchLoader
from launch.run.health import Health
from launch.run.saving import Saving
from launch.run.spikes import SpikeDetector
from launch.run.stop import StopRequest
from launch.run.trainer import ROLLBACKS, Position, StepTimer, Trainer
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.balance import LoadBalancer
from model.config import BALANCE_RULES
from model.router import Gate

SHORT_DOCUMENTS = Path(__file__).resolve().parents[2] / "fixtures" / "shards_before_rooms" / "finished"


def to_restore(**parts: Any) -> Any:
    """As much of a trainer as goes on from a state."""
    parts = {"spikes": SpikeDetector(sigma=6, window=50, rollback_after=3), "judging": judging(validation=None), **parts}
    trainer: Any = SimpleNamespace(**parts)
    trainer.restore = lambda state: Trainer.restore(trainer, state)
    return trainer


def restored(extra: dict[str, Any]) -> Any:
    trainer = to_restore()
    trainer.restore(TrainingState(step=4, samples=32, tokens=99, extra=extra))
    return trainer


def test_a_state_comes_back() -> None:
    state = SpikeDetector(sigma=6, window=50, rollback_after=3).state()
    trainer = restored({"guard": state, "bad_evaluations": 2, "wandb_id": "x"})
    assert (trainer.position.step, trainer.position.samples, trainer.judging.bad_evaluations) == (4, 32, 2)


def test_what_is_saved_of_a_run_is_what_it_goes_on_with() -> None:
    """All of the position, of the guard's history and of the best, by way of JSON."""
    position = Position(step=7, samples=72, tokens=2304, wandb_id="abc-1")
    guard = SpikeDetector(
        sigma=6, window=50, rollback_after=3, losses=[2.0, 0.1], norms=[0.5], skipped_in_a_row=1, skipped_in_all=4
    )
    judged = judging(1.25, 2.5)
    for step in (4, 6):
        judged.judge(step)
    defaults, fresh = Position(), SpikeDetector(sigma=6, window=50, rollback_after=3)
    assert all(value != getattr(defaults, name) for name, value in vars(position).items())
    saved = Trainer.state(SimpleNamespace(position=position, spikes=guard, judging=judged))  # type: ignore[arg-type]
    assert list(saved.extra) == ["bad_evaluations", "judged_on", "wandb_id", "guard"]
    saved = TrainingState(**json.loads(json.dumps(asdict(saved))))
    trainer = to_restore(spikes=fresh)
    trainer.restore(saved)
    assert trainer.position == position and trainer.spikes == guard
    assert (trainer.judging.best_loss, trainer.judging.best_step, trainer.judging.bad_evaluations) == (1.25, 4, 1)
    assert trainer.judging.extra() == judged.extra()


@pytest.mark.parametrize("finite", [True, False])
def test_a_rollback_takes_the_state_before_the_skipped_steps_and_keeps_the_place_in_the_data(finite: bool) -> None:
    """Steps 6, 7 and 8 were skipped. What was saved among them holds the count of them, and is passed over."""
    asked: list[float] = []
    extra = {
        "guard": SpikeDetector(sigma=6, window=50, rollback_after=3, losses=[3.0]).state(),
        "bad_evaluations": 1,
        "wandb_id": "another",
    }
    held = TrainingState(step=5, samples=40, tokens=99, best_loss=2.5, extra=extra)
    guard = SpikeDetector(sigma=6, window=50, rollback_after=3, losses=[3.0, 4.0], skipped_in_a_row=3, skipped_in_all=9)
    saving = SimpleNamespace(
        saved_at=8,
        finish_pending_save=lambda step: None,
        load=lambda found: found.state,
        checkpoints=SimpleNamespace(newest=lambda before: asked.append(before) or SimpleNamespace(state=held)),
    )
    counted_from: list[int] = []
    trainer = to_restore(
        position=Position(step=8, samples=64, tokens=512, wandb_id="present"),
        spikes=guard,
        saving=saving,
        monitor=SimpleNamespace(say=lambda line: None, count_from=counted_from.append),
        _rolled_back=[],
    )
    assert Trainer.roll_back(trainer, finite=finite)
    assert asked == [6], "the state after step 5 is as good as any"
    assert (trainer.position.step, trainer.position.samples, trainer.judging.best_loss) == (5, 64, 2.5)
    assert trainer.position.tokens == 512, "both are what was consumed since the run began"
    assert counted_from == [5]
    assert trainer.position.wandb_id == "present", "the tracker was opened under it"
    assert (guard.losses, guard.skipped_in_a_row, guard.skipped_in_all) == ([3.0], 0, 9)
    assert saving.saved_at == -1, "step 5 with this place in the data is saved nowhere: a run that stops here must save it"


@pytest.mark.parametrize("finite", [True, False])
def test_a_run_that_ends_over_skipped_steps_is_told_what_would_help(finite: bool) -> None:
    """NaN is skipped without --spike_sigma too: that flag is named for spikes alone."""
    held = SimpleNamespace(state=TrainingState(step=5, samples=40, tokens=99, extra={}))
    trainer: Any = SimpleNamespace(
        position=Position(step=8),
        spikes=SpikeDetector(sigma=6, window=50, rollback_after=3, skipped_in_a_row=3),
        saving=SimpleNamespace(finish_pending_save=lambda step: None, checkpoints=SimpleNamespace(newest=lambda before: held)),
        _rolled_back=[5] * ROLLBACKS,
    )
    with pytest.raises(AgreedError, match="skipped and 3 times back at step 5; lower the learning rate") as said:
        Trainer.roll_back(trainer, finite=finite)
    assert ("--spike_sigma 0" in str(said.value)) == finite


def test_spikes_without_a_checkpoint_to_go_back_to_are_judged_anew() -> None:
    """By their own level: with the old history every further step would be far out as well."""
    history = {"losses": [3.0] * 40, "norms": [1.0] * 40}
    guard = SpikeDetector(sigma=6, window=50, rollback_after=3, **history, skipped_in_a_row=3, skipped_in_all=9)
    checkpoints = SimpleNamespace(newest=lambda before: None)
    trainer: Any = SimpleNamespace(
        position=Position(step=8),
        spikes=guard,
        saving=SimpleNamespace(finish_pending_save=lambda step: None, checkpoints=checkpoints),
        monitor=SimpleNamespace(say=lambda line: None),
    )
    assert not Trainer.roll_back(trainer, finite=True)
    assert (guard.losses, guard.norms, guard.skipped_in_a_row, guard.skipped_in_all) == ([], [], 0, 9)


@pytest.mark.parametrize("extra", [{}, {"guard": 3, "bad_evaluations": 0, "wandb_id": ""}, {"guard": {}, "wandb_id": ""}])
def test_a_state_without_sense_is_a_sentence(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step_4/state\.json: extra is not what a run of this system saves"):
        restored(extra)


def test_a_best_is_saved_as_such_before_the_tasks_and_a_reason_to_stop_is_the_outcome() -> None:
    """None at step 0, where nothing is trained. What a signal has said stays said."""
    done: list[Any] = []
    one: Any = judging(8.0, 7.0, 7.5, 7.6, tasks={"code": ScriptedValidation(3.0, 3.0, 3.0, 3.0)}, patience=1)
    trainer: Any = SimpleNamespace(
        position=Position(), judging=one, outcome="", save=lambda *, is_best: done.append((len(one.monitor.rows), is_best))
    )
    outcomes = []
    for step in (0, 2, 4, 6):
        trainer.position.step = step
        trainer.outcome = "stopped by SIGTERM" if step == 6 else ""
        Trainer.validate(trainer)
        outcomes.append(trainer.outcome)
    assert done == [(3, True)], "after the row of this loss, with that of its tasks to come"
    assert outcomes == ["", "", "stopped early: 1 evaluations without a new best", "stopped by SIGTERM"]
    assert [row["step"] for row in one.monitor.rows if "eval/code_loss" in row] == [0, 2, 4, 6]


def test_a_checkpoint_carries_no_best_whose_save_has_failed() -> None:
    """With --async_save that is heard of in the next save: a resume from there had no best, and `--keep_last` deleted the one
    before it."""
    saved: list[Any] = []

    def fail() -> None:
        raise AgreedError("the disk is full")

    checkpoints = SimpleNamespace(
        background=True, wait=fail, save=lambda engine, state, **_: saved.append(state) or Path("step_25")
    )
    one, told = judging(2.5, 2.4), HeardMonitor()
    saving: Any = Saving(
        engine=None,  # type: ignore[arg-type]
        settings=None,  # type: ignore[arg-type]
        checkpoints=checkpoints,  # type: ignore[arg-type]
        monitor=told,
        on_saved=print,
        on_best_lost=one.take_back,
        on_best_again=one.give_back,
    )
    trainer: Any = SimpleNamespace(
        position=Position(),
        arguments=SimpleNamespace(save_interval=25),
        judging=one,
        outcome="",
        spikes=SimpleNamespace(state=dict, skipped_in_a_row=0),
        watchdog=one.watchdog,
        saving=saving,
    )
    trainer.state, trainer.save = partial(Trainer.state, trainer), partial(Trainer.save, trainer)
    for trainer.position.step in (0, 20):
        Trainer.validate(trainer)
    trainer.position.step = 25
    trainer.save()
    assert [(state.best_loss, state.best_step) for state in saved] == [(2.4, 20), (2.5, 0)]


@pytest.mark.parametrize(
    ("step", "is_best", "counted"), [(20, True, False), (30, True, True), (30, False, True), (20, False, True)]
)
def test_a_new_best_counts_where_a_checkpoint_was_due_anyway(step: int, is_best: bool, counted: bool) -> None:
    """20: at a rollback or the end."""
    saved: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(
        position=Position(step=step),
        arguments=SimpleNamespace(save_interval=15),
        spikes=SimpleNamespace(skipped_in_a_row=3),
        watchdog=SimpleNamespace(at=lambda step, phase: None),
        saving=SimpleNamespace(save=lambda step, state, **options: saved.append(options)),
        state=None,
    )
    Trainer.save(trainer, is_best=is_best)
    assert saved == [{"is_best": is_best, "counted": counted, "skipped": 3}]


def test_the_clock_counts_steps_and_not_what_lies_between() -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0, 50.0, 54.0])
    timer = StepTimer(lambda: next(clock))
    for seconds in (2.0, 3.0):
        timer.start()
        assert timer.stop() == seconds
    assert timer.take() == (5.0, 2) and timer.take() == (0.0, 0)
    timer.start()
    assert timer.stop() == 4.0 and timer.take() == (4.0, 1)


def test_the_last_step_is_logged_wherever_the_run_ends() -> None:
    """`--stop_after` ends it before `--max_steps`, at no multiple of the interval."""
    trainer: Any = SimpleNamespace(arguments=SimpleNamespace(log_interval=10, max_steps=100), last_step=7)
    assert [step for step in range(1, 21) if Trainer.is_logged(trainer, step)] == [7, 10, 20]


@pytest.mark.parametrize("ranks", [1, 8])
def test_speed_is_of_all_ranks_and_mfu_of_one(ranks: int) -> None:
    """Five steps of 16 samples of 1,024 tokens in 4 s are 20,480 tokens a second; at 1 GFLOP each, of all devices' peak."""
    rows: list[dict[str, Any]] = []
    health = SimpleNamespace(take=lambda **given: {"step_seconds": given["seconds"] / given["steps"]})
    trainer: Any = SimpleNamespace(
        position=Position(step=20, samples=320, tokens=327_680),
        _timer=SimpleNamespace(take=lambda: (4.0, 5)),
        global_batch=16,
        arguments=SimpleNamespace(sequence_length=1024),
        watchdog=SimpleNamespace(at=lambda step, phase: None),
        health=health,
        device=torch.device("cpu"),
        flops_per_token=1e9,
        peak_flops=1e14,
        world_size=ranks,
        monitor=SimpleNamespace(log=rows.append),
    )
    Trainer.log(trainer, {"loss": 2.0})
    expected = {"step": 20, "samples": 320, "tokens": 327_680, "tokens_per_second": 20_480.0, "step_seconds": 0.8}
    assert {name: rows[0][name] for name in expected} == expected
    assert rows[0]["mfu"] == pytest.approx(20_480e9 / (1e14 * ranks)) and "MFU" in trainer._shown["MFU"]
    trainer.peak_flops = None
    Trainer.log(trainer, {"loss": 2.0})
    assert "mfu" not in rows[1]


@pytest.mark.parametrize("document_mask", [False, True])
def test_loss_and_gradient_are_the_mean_over_all_targets(document_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with three micro-batches each, one rank after the other, against plain cross entropy over the global batch."""
    ranks, accumulation = 2, 3
    data = PackedDataset([SHORT_DOCUMENTS], split="train", sequence_length=16, document_mask=document_mask)
    torch.manual_seed(0)
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", vocab_size=data.vocab_size, hidden_size=32, num_hidden_layers=2))

    class Engine:
        """As DeepSpeed's: gradients are averaged over micro-batches and ranks."""

        def __call__(self, **batch: Any) -> Any:
            return model(**batch)

        def backward(self, loss: torch.Tensor) -> None:
            (loss / accumulation / ranks).backward()

        def step(self) -> None: ...

        def get_lr(self) -> list[float]:
            return [0.1]

    summed = torch.zeros(3, dtype=torch.float64)
    monkeypatch.setattr("launch.run.trainer.dist.all_reduce", lambda numbers: numbers.copy_(summed.add_(numbers)))
    loss = math.nan
    for rank in range(ranks):
        loader = BatchLoader(
            data, rank=rank, world_size=ranks, micro_batch=1, accumulation=accumulation, device=torch.device("cpu")
        )
        trainer: Any = SimpleNamespace(
            engine=Engine(),
            accumulation=accumulation,
            world_size=ranks,
            device=torch.device("cpu"),
            position=Position(),
            watchdog=SimpleNamespace(at=lambda step, phase: None),
            stop=StopRequest(),
            saving=SimpleNamespace(checkpoints=SimpleNamespace(written=lambda: False)),
            step_hook=SimpleNamespace(step=lambda reason_to_skip: None),
            health=SimpleNamespace(is_detailed=lambda step: False),
            next_batches=lambda loader=loader: loader.step(0),
            advance=lambda loss, reason: {"loss": loss},
        )
        trainer.reduce_loss_and_flags = lambda total, trainer=trainer: Trainer.reduce_loss_and_flags(trainer, total)
        trainer.accumulate = partial(Trainer.accumulate, trainer)
        loss = Trainer.train_step(trainer)["loss"]
        loader.close()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    batch = data.batch(range(ranks * accumulation))
    targets = batch.pop("shift_labels")
    assert (len(set((targets != -100).sum(1).tolist())) > 1) == document_mask, "else a mean of means is the mean"
    expected = F.cross_entropy(model(**batch).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def balanced(rule: str, **more: Any) -> tuple[Any, Gate]:
    """As much of a trainer as moves past a step, over one router that a step has moved already."""
    torch.manual_seed(0)
    config = MoEGPTConfig.preset("tiny", hidden_size=32, router_balance=rule, router_bias_rate=0.01, **more)
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=0.5)
    trainer = SimpleNamespace(
        position=Position(),
        global_batch=8,
        arguments=SimpleNamespace(sequence_length=16, max_steps=10),
        step_hook=SimpleNamespace(grad_norm=1.0, overflowed=False),
        spikes=SpikeDetector(sigma=6, window=50, rollback_after=3),
        balancer=LoadBalancer.of(config, [gate]),
        health=Health(clip=1.0, interval=1),
        monitor=SimpleNamespace(say=lambda line: None),
        is_logged=lambda step: True,
    )
    return trainer, gate


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_a_skipped_step_moves_no_bias_and_leaves_no_count(rule: str) -> None:
    """Neither at once nor in the step after it: the bias is then that of a run which never saw the skipped tokens."""
    (trainer, gate), (twin, untouched) = balanced(rule), balanced(rule)
    first, skipped, last = (torch.randn(128, 32) + shift for shift in (0.5, -0.5, 0.2))
    for run, router in ((trainer, gate), (twin, untouched)):
        router(first)
        Trainer.advance(run, 2.0, None)
    before = gate.e_score_correction_bias.clone()
    assert bool(before.any()) == (rule != "none")

    gate(skipped)
    counters = [gate.load_E, gate.logit_square_sum, *([] if gate.lift_EN is None else [gate.lift_EN])]
    assert all(counter.any() for counter in counters) and len(counters) == 2 + (rule == "quantile")
    metrics = Trainer.advance(trainer, 90.0, "a spike")
    assert metrics["skipped"] == "a spike" and "load_max_over_mean" not in metrics
    assert torch.equal(gate.e_score_correction_bias, before) and not any(counter.any() for counter in counters)

    gate(last)
    untouched(last)
    after, expected = Trainer.advance(trainer, 2.0, None), Trainer.advance(twin, 2.0, None)
    assert after == expected and trainer.position.step == twin.position.step + 1
    assert torch.equal(gate.e_score_correction_bias, untouched.e_score_correction_bias)
    assert trainer.health.window_load_YE.sum() == 2 * 128 * 2


def test_the_rate_of_balancing_decays_over_the_whole_run() -> None:
    """By the steps of the schedule, of which the first of ten is a tenth, and the last all."""
    apart = []
    for step in (1, 10):
        trainer, gate = balanced("sign", router_bias_decay=0.5)
        trainer.position.step = step - 1
        gate(torch.randn(128, 32) + 0.5)
        Trainer.advance(trainer, 2.0, None)
        apart.append(float(gate.e_score_correction_bias.max() - gate.e_score_correction_bias.min()))
    assert apart == pytest.approx([0.02 * 0.95, 0.02 * 0.5])


def test_looking_for_a_loss_scale_is_no_row_of_spikes() -> None:
    """fp16 from 2^32, as many a JSON has it: a dozen steps overflow before one is taken. A loss that is not finite counts."""
    trainer, _ = balanced("none")
    trainer.step_hook = SimpleNamespace(grad_norm=math.inf, overflowed=True)
    for _ in range(12):
        Trainer.advance(trainer, 2.0, "gradient norm is inf")
    assert (trainer.spikes.skipped_in_all, trainer.spikes.skipped_in_a_row, trainer.position.step) == (12, 0, 12)
    due: list[bool] = []
    for _ in range(3):
        Trainer.advance(trainer, math.nan, "loss is nan")
        due.append(trainer._rollback_due)
    assert due == [False, False, True]


def test_a_rollback_comes_after_the_steps_row_and_before_no_evaluation() -> None:
    """Step 6 was logged by the number of the step that it went back to, whose weights were evaluated and counted a second time."""
    done: list[tuple[str, int]] = []
    position = Position(step=4)

    def train_step() -> dict[str, Any]:
        position.step += 1
        trainer._rollback_due = position.step == 6 and ("back", 4) not in done
        return {"loss": math.nan, "grad_norm": 1.0, **({"skipped": "loss is nan"} if trainer._rollback_due else {})}

    def roll_back(*, finite: bool) -> bool:
        assert not finite
        position.step, trainer._rollback_due = 4, False
        done.append(("back", 4))
        return True

    trainer: Any = SimpleNamespace(
        arguments=SimpleNamespace(eval_interval=2, save_interval=4, max_steps=8),
        position=position, last_step=8, outcome="", profile=None, _rollback_due=False,
        _timer=StepTimer(), watchdog=SimpleNamespace(at=lambda step, phase: None), loader=SimpleNamespace(close=lambda: None),
        evaluator=SimpleNamespace(take=lambda step: None, leave=lambda: None),
        saving=SimpleNamespace(finish=lambda step, state, skipped: done.append(("finished", skipped))), state=lambda: None,
        spikes=SimpleNamespace(skipped_in_a_row=3),
        train_step=train_step, roll_back=roll_back, is_logged=lambda step: False, show_progress=lambda metrics: None,
        log=lambda metrics: done.append(("row", position.step)),
        validate=lambda: done.append(("evaluation", position.step)),
        save=lambda: done.append(("saved", position.step)),
    )  # fmt: skip
    assert Trainer.train(trainer) == "finished"
    assert done == [("row", 6), ("back", 4), ("saved", 4), ("evaluation", 6), ("evaluation", 8), ("saved", 8), ("finished", 3)]
