"""What a run is put together from: every setting of the command line and of the JSON reaches the part that obeys it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import OLD

from launch.checkpoint.choose import ResumeFrom, StartFresh
from launch.checkpoint.state import TrainingState
from launch.engine.build import without_our_keys
from launch.engine.strategy import Strategy
from launch.ranks.control_group import ControlGroup
from launch.run import assemble, session
from launch.run.arguments import parse_arguments
from launch.run.assemble import begin_records, greet, make_trainer, too_short_hint
from launch.run.resolve import resolve_run
from launch.run.session import Session
from launch.run.stop import StopRequest
from model import MoEGPTForCausalLM

pytestmark = pytest.mark.usefixtures("one_rank")
CLIP, MICRO_BATCH, ACCUMULATION = 0.25, 2, 3
CODE = "the shards of --eval_tasks code"


def without_zero(folder: Path) -> Path:
    """A JSON of ZeRO 0, whose clipping is ours (`StepHook`) and not DeepSpeed's."""
    config = json.loads((OLD / "deepspeed.json").read_text()) | {
        "train_batch_size": MICRO_BATCH * ACCUMULATION,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 0},
    }
    config["expert_parallel"]["autoep_size"] = 1
    del config["data_types"]  # DeepSpeed sums in the weights' dtype there
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    fields = json.loads((OLD / "model.json").read_text())
    fields |= {"router_balance": "proportional", "router_bias_rate": 0.02, "router_bias_decay": 0.5, "router_bias_average": 0.25}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    (tmp_path / "run").mkdir()
    flags = {
        "data": OLD / "tokens", "model": tmp_path / "model.json", "output": tmp_path / "run", "sequence_length": 16,
        "deepspeed_config": without_zero(tmp_path), "max_steps": 100, "stop_after": 40, "eval_interval": 5, "eval_batches": 2,
        "log_interval": 7, "patience": 6,
        "spike_sigma": 7.5, "spike_window": 33, "spike_rollback": 4, "health_interval": 9, "tracker": "none",
    }  # fmt: skip
    arguments = parse_arguments([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    run = resolve_run(arguments, 1)
    model = MoEGPTForCausalLM(run.model)
    engine: Any = SimpleNamespace(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        lr_scheduler=None,
        device=torch.device("cpu"),
        train_micro_batch_size_per_gpu=lambda: MICRO_BATCH,
        gradient_accumulation_steps=lambda: ACCUMULATION,
        train_batch_size=lambda: MICRO_BATCH * ACCUMULATION,
    )
    watchdog: Any = SimpleNamespace(phase=lambda text: None)
    made = make_trainer(arguments, run, engine, SimpleNamespace(background=False), StopRequest(), watchdog)  # type: ignore[arg-type]
    made.deepspeed = run.deepspeed  # type: ignore[attr-defined]
    yield made
    made.loader.close()
    made.monitor.close()


def test_every_setting_reaches_its_part(trainer: Any) -> None:
    balancer, spikes, loader, judging = trainer.balancer, trainer.spikes, trainer.loader, trainer.judging
    assert (balancer.rule, balancer.rate, balancer.decay, balancer.average) == ("proportional", 0.02, 0.5, 0.25)
    assert balancer.all_reduce is dist.all_reduce and len(balancer.routers) == trainer.engine.module.config.num_hidden_layers
    assert (spikes.sigma, spikes.window, spikes.rollback_after) == (7.5, 33, 4)
    assert (trainer.health.clip, trainer.health.interval) == (CLIP, 9)
    assert trainer.last_step == 40, "the schedule's steps are 100"
    assert [step for step in range(1, 41) if trainer.is_logged(step)] == [7, 14, 21, 28, 35, 40], "and the last one"
    assert judging.validation.samples == 2 * trainer.global_batch == 12 and judging.patience == 6
    assert judging.validation.data.split == "validation" and trainer.train_data.split == "train" and not judging.tasks
    assert trainer.saving.on_best_lost == judging.take_back
    assert (loader.micro_batch, loader.accumulation, loader.global_batch) == (MICRO_BATCH, ACCUMULATION, trainer.global_batch)


def test_a_folder_of_which_nothing_is_read_is_named() -> None:
    """Its validation split was shorter than a sample, and nobody was told that it is not judged."""
    data: Any = SimpleNamespace(sequence_length=8, split="validation", too_short=[SimpleNamespace(folder=Path("b"), tokens=3)])
    assert too_short_hint(data) == "warning: a sample needs 9 tokens, so the validation split of these gives none: b (3 tokens)"
    assert too_short_hint(SimpleNamespace(**{**vars(data), "too_short": []})) is None  # type: ignore[arg-type]


def test_without_zero_gradients_are_clipped_all_the_same(trainer: Any) -> None:
    """By us, once: DeepSpeed is told not to, and a run whose hook is not told to would be clipped by nobody."""
    theirs = without_our_keys(trainer.deepspeed, Strategy.of(trainer.deepspeed))
    assert theirs["gradient_clipping"] == 0 and trainer.deepspeed["gradient_clipping"] == CLIP
    module = trainer.engine.module
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    trainer.step_hook._reason_to_skip = lambda norm: None
    trainer.engine.optimizer.step()
    moved = before - torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert trainer.step_hook.grad_norm == pytest.approx(before.numel() ** 0.5)
    assert float(moved.double().norm()) == pytest.approx(0.1 * CLIP, rel=1e-3)


def test_a_checkpoint_named_from_inside_its_folder_is_compared_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume step_4`, `--resume ../checkpoints/step_4`: the run is two folders up, wherever one stands, and so it is where its
    `checkpoints` is a link to another disk."""
    disk, folder = tmp_path / "disk" / "of_this_run", tmp_path / "run" / "checkpoints"
    (disk / "step_4").mkdir(parents=True)
    folder.parent.mkdir()
    folder.symlink_to(disk)
    held, asked = ({"optimizer": {"type": "AdamW", "params": {"lr": rate}}} for rate in (1, 2))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"deepspeed": held}))
    flags = SimpleNamespace(deterministic=False)
    now: Any = SimpleNamespace(run=SimpleNamespace(deepspeed=asked), arguments=flags)

    def compared(path: Path) -> list[str]:
        choice = ResumeFrom(message="", path=path, state=TrainingState(step=4, samples=0, tokens=0))
        return Session.compare_settings(now, choice, ControlGroup())

    assert compared(folder / "step_4") == ["optimizer.params.lr: 1 -> 2"]
    folder.unlink()
    disk.rename(folder)
    monkeypatch.chdir(folder)
    for inside in ("step_4", "../checkpoints/step_4"):
        assert compared(Path(inside)) == ["optimizer.params.lr: 1 -> 2"]
    flags.deterministic = True  # of a run from before the flag
    assert compared(Path("step_4")) == ["--deterministic: false -> true", "optimizer.params.lr: 1 -> 2"]


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_begins_at_anothers_checkpoint_has_a_tracker_of_its_own(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """`--output runs/second --resume runs/first` wrote its curves into the W&B run of the first."""
    trainer: Any = SimpleNamespace(position=SimpleNamespace(wandb_id=""), saving=SimpleNamespace(load=lambda choice: choice.state))
    trainer.restore = lambda state: setattr(trainer.position, "wandb_id", state.extra["wandb_id"])
    monkeypatch.setattr(session, "make_trainer", lambda *_: trainer)
    monkeypatch.setattr(session, "greet", lambda *_: None)
    now: Any = SimpleNamespace(arguments=None, run=None, stop=None, watchdog=None)
    state = TrainingState(step=4, samples=0, tokens=0, extra={"wandb_id": "first"})
    choice = ResumeFrom(message="", path=Path("step_4"), state=state, is_own=own)
    checkpoints: Any = None
    Session.prepare(now, trainer, checkpoints, choice)
    assert (trainer.position.wandb_id == "first") == own and trainer.position.wandb_id


def test_the_plan_is_of_the_ranks_of_a_host_whatever_a_rank_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task shows each rank one GPU: the plan had every exchange go over the network."""
    planned: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(session.rehearsal, "rehearse", lambda *_: None)
    monkeypatch.setattr(assemble, "job_of_run", lambda _, ranks_per_node: planned.append(ranks_per_node))
    for name in ("memory_line", "duration_line"):
        monkeypatch.setattr(assemble, name, lambda *_, **__: None)
    trainer: Any = SimpleNamespace(
        device=torch.device("cpu"),
        monitor=SimpleNamespace(say=lambda _: None),
        last_step=9,
        position=SimpleNamespace(step=0),
        arguments=SimpleNamespace(save_interval=1),
        judging=SimpleNamespace(validation=None),
    )
    run: Any = SimpleNamespace(watchdog=SimpleNamespace(phase=lambda _: None), memory_before=0.0)
    ranks: Any = SimpleNamespace(gather=lambda _: ["node0"] * 8 + ["node1"] * 8)
    Session.rehearse(run, trainer, ranks, {"world_size": 16})
    assert planned == [8]


def test_the_memory_beside_the_plan_is_the_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts on eight ranks building `4b` takes 17.5 GB of a GPU and training 6.5, and the first was called the second."""
    peak, measured = [17.5e9], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 1.0e9))
    monkeypatch.setattr(session.rehearsal, "rehearse", lambda *_: peak.__setitem__(0, max(peak[0], 6.5e9)))
    monkeypatch.setattr(session, "say_what_to_expect", lambda *given, **_: measured.append(given[2]))
    run: Any = SimpleNamespace(watchdog=SimpleNamespace(phase=lambda _: None), memory_before=0.0)
    trainer: Any = None
    ranks: Any = SimpleNamespace(gather=lambda _: ["node0"])
    Session.rehearse(run, trainer, ranks, {})
    assert measured == [6.5e9]


def test_the_engine_is_made_of_the_weights_that_init_from_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded once it stands, they would come too late: its optimizer holds masters of its own, which the first step writes back."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(session, "check_room", lambda *_: None)
    monkeypatch.setattr(session, "build_model", lambda *_, **__: torch.nn.Linear(2, 2))
    monkeypatch.setattr(session, "load_weights", lambda model, source: model.weight.data.fill_(source))
    monkeypatch.setattr(session, "build_engine", lambda model, _: seen.append(model.weight.detach().clone()))
    arguments = SimpleNamespace(seed=1, attn_implementation=None, init_from=7)
    run = SimpleNamespace(model=None, deepspeed={}, strategy=SimpleNamespace(ep_size=1))
    now: Any = SimpleNamespace(watchdog=SimpleNamespace(phase=lambda _: None), arguments=arguments, run=run)
    Session.build(now, StartFresh(), ControlGroup())
    assert len(seen) == 1 and bool((seen[0] == 7).all())


@pytest.mark.parametrize("judged_on_others", [True, False])
def test_a_branch_is_left_once_the_rehearsal_went_well(monkeypatch: pytest.MonkeyPatch, judged_on_others: bool) -> None:
    """A start that died in it had taken rows out of the metrics of a run that goes on without it. Other samples are told of."""
    done: list[str] = []
    said: list[str] = []
    trainer = SimpleNamespace(
        monitor=SimpleNamespace(say=said.append),
        judging=SimpleNamespace(was_judged_on_others=lambda state: judged_on_others and state.step == 4),
        train=lambda: done.append("train"),
    )
    choice = ResumeFrom(message="", path=Path("step_4"), state=TrainingState(step=4, samples=0, tokens=0))
    checkpoints = SimpleNamespace(begin=lambda choice: done.append("begin"), left_hint=lambda: "2 checkpoints of branches")
    now: Any = SimpleNamespace(
        arguments=None,
        run=None,
        choose_checkpoint=lambda _: (checkpoints, choice),
        compare_settings=lambda *_: [],
        prepare=lambda *_: trainer,
        rehearse=lambda *_: done.append("rehearse"),
        publish_config=lambda *_: done.append("config"),
        **dict.fromkeys(("join", "check", "build", "describe", "watch_folder", "finish"), lambda *_: None),
    )
    monkeypatch.setattr(session, "identify", lambda *_: None)
    monkeypatch.setattr(session, "begin_records", lambda *_: done.append("records"))
    Session.run_to_end(now)
    assert done == ["rehearse", "config", "begin", "records", "train"] and "2 checkpoints of branches" in said
    assert any("validation samples are others" in line for line in said) == judged_on_others


def test_a_start_takes_no_row_out_of_the_metrics_before_its_records_begin(trainer: Any) -> None:
    path = trainer.arguments.output / "metrics.jsonl"
    rows = ['{"step": 4, "samples": 24}\n', '{"step": 5, "samples": 30}\n']
    path.write_text("".join(rows))
    trainer.position.step, trainer.position.samples = 4, 24
    choice = ResumeFrom(message="resuming", path=Path("step_4"), state=TrainingState(step=4, samples=24, tokens=0))
    run = resolve_run(trainer.arguments, 1)
    greet(trainer, run, choice)
    assert path.read_text() == "".join(rows)
    begin_records(trainer, choice, {})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in found] == [4, 4] and found[1]["resumed"] == "resuming"


def test_all_shards_that_are_read_are_the_same_on_all_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of --eval_tasks nothing was compared: one more sample on one host, and the others waited for its forward pass."""

    def facts(**bytes_of: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        data = {name: SimpleNamespace(fingerprint=content[1:], content=content[:1]) for name, content in bytes_of.items()}
        run: Any = SimpleNamespace(
            deepspeed={}, train_data=data["train"], validation_data=data.get("validation"), task_data={"code": data["code"]}
        )
        arguments = SimpleNamespace(as_json=dict, output=None, verify=False)
        now: Any = SimpleNamespace(run=run, arguments=arguments, take_folder=lambda: None, watchdog=SimpleNamespace(phase=print))
        monkeypatch.setattr(session, "sample_of_bytes", lambda data: data.content)
        monkeypatch.setattr(session.preflight, "check", lambda ranks, output, same: seen.update(same))
        monkeypatch.setattr(session.run_folder, "check_same_run", lambda *_: None)
        identity: Any = SimpleNamespace(to_json=dict)
        Session.check(now, ControlGroup(), identity)
        return seen

    alike = {"train": "a1", "validation": "b1", "code": "c1"}
    one, split = facts(**alike), "the shards of the validation split"
    assert split not in facts(train="a1", code="c1")
    changes = [("train", "x1", "the shards' bytes")]
    changes += [(name, to, what) for name, what in (("validation", split), ("code", CODE)) for to in ("x1", alike[name][0] + "2")]
    for name, changed, what in changes:
        other = facts(**{**alike, name: changed})
        assert [fact for fact in one if one[fact] != other[fact]] == [what]
