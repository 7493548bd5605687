"""What is saved, what is kept of it, and what a full disk or a kill in the middle of a save leaves. One process and a stub engine;
the faults that need real ranks are in `test_ranks.py`."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killed_at import in_child
from stub_engine import MODEL, OPTIMIZER, StubEngine, manager, state, steps, whole

from data.cli import UserError
from data.terminal import drain
from launch.checkpoint import manager as manager_module
from launch.checkpoint import publish
from launch.checkpoint.engine_files import CheckpointFiles, state_bytes
from launch.checkpoint.manager import CheckpointManager
from launch.checkpoint.restore import random_state_name, restore
from launch.cli import AgreedError


def test_state_and_engine_come_back(run):
    engine, checkpoints = StubEngine(seed=50), manager(run)
    checkpoints.save(engine, state(7, guard=[0.1, 1e-300, 3], wandb_id="x"))
    drawn = [torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal()]
    other = StubEngine(seed=51)
    loaded = checkpoints.load(other, manager(run).choose("auto"))
    assert loaded == state(7, guard=[0.1, 1e-300, 3], wandb_id="x")
    again = [torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal()]
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name
    assert other.module[1].num_batches_tracked == 51  # it is saved as it was, and an int64 buffer stays one


@pytest.mark.parametrize(("seed", "three_on"), [(40, 43), (-2, 1)])
def test_a_rank_that_the_saved_run_did_not_have_draws_new_numbers(run, seed, three_on):
    """By the seed it was started with it would draw those of step 0 once more, and the same after every further resume."""
    choice, drawn = manager(run).choose("auto"), []
    for rank in (0, 5):
        engine = StubEngine()
        torch.manual_seed(seed)
        restore(engine, choice, choice.path, SimpleNamespace(rank=rank, run_everywhere=lambda action: [action()]))
        drawn.append(torch.rand(3))
    assert not (choice.path / random_state_name(5)).exists()
    afresh = [torch.rand(3, generator=torch.Generator().manual_seed(by)) for by in (seed, three_on)]
    assert torch.equal(drawn[1], afresh[1]) and not torch.equal(drawn[1], afresh[0]) and not torch.equal(*drawn)


def test_retention(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2, 3, 4, 5, 6, 7):
        manager(run, keep_last=2, keep_every=3).save(StubEngine(), state(step), is_best=step == 2)
    assert steps(run) == [2, 3, 6, 7]  # 2 is the best, 3 and 6 are multiples, 6 and 7 the newest
    assert (run / "checkpoints/latest").read_text() == "step_7"
    assert (run / "checkpoints/best").read_text() == "step_2"
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_file()) == ["best", "latest"]


def test_a_new_best_at_every_evaluation_pushes_no_other_out(tmp_path):
    """Also where another process saved those before, and where one is damaged."""
    run = tmp_path / "run"
    for step in (10, 13, 16, 20, 22, 24, 26):
        others = step % 10 == 0
        manager(run, keep_last=2).save(StubEngine(), state(step), is_best=not others, counted=others)
        (run / "checkpoints" / f"step_{step}" / "buffers.pt").unlink()
    assert steps(run) == [10, 20, 26]
    manager(run, keep_last=2).save(StubEngine(), state(30))
    assert steps(run) == [20, 26, 30] and (run / "checkpoints/best").read_text() == "step_26"


def test_going_on_from_an_older_one_neither_counts_nor_deletes_what_lies_beyond(run):
    checkpoints = manager(run, keep_last=1)
    (run / "checkpoints/latest").write_text("step_1")
    choice = checkpoints.choose("auto")
    assert choice.state.step == 1
    shutil.rmtree(run / "checkpoints/step_2")
    checkpoints.save(StubEngine(), state(2))
    assert steps(run) == [2, 3]
    assert manager(run).choose("auto").state.step == 2


def test_what_was_saved_before_a_row_of_skipped_steps_is_kept_until_one_is_taken(run):
    checkpoints = manager(run, keep_last=1)
    for step, skipped in ((4, 1), (5, 2)):
        checkpoints.save(StubEngine(), state(step), skipped=skipped)
        assert steps(run) == [3, step]
    assert manager(run).newest(before=4).path.name == "step_3"
    checkpoints.save(StubEngine(), state(6))
    assert steps(run) == [6]


def test_saving_a_step_again_replaces_it(run):
    manager(run).save(StubEngine(seed=77), state(3, again=True))
    assert manager(run).choose("auto").state.extra == {"again": True}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_1", "step_2", "step_3"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda checkpoints: checkpoints.newest(),
        lambda checkpoints: checkpoints.choose("auto"),
        lambda checkpoints: checkpoints.load(StubEngine(), checkpoints._chooser.choose("step_3")),
        lambda checkpoints: checkpoints.save(StubEngine(), state(5)),
    ],
    ids=["newest", "choose", "load", "save"],
)
def test_whoever_asks_gets_the_answer_of_after_the_save_under_way(run, monkeypatch, ask):
    """In the background. Else a rollback would go further back than it must, and a load begin while files are still written."""
    gate, flush = threading.Event(), CheckpointFiles.flush
    monkeypatch.setattr(CheckpointFiles, "flush", lambda self: gate.wait(30) and flush(self))

    def on_phase(phase):
        if phase == "saving: waiting for the disk":  # the files are written once somebody waits for them
            gate.set()

    checkpoints = CheckpointManager(
        run, keep_last=0, keep_every=0, identity=manager(run).identity, background=True, on_phase=on_phase
    )
    path = checkpoints.save(StubEngine(), state(4))
    assert not path.exists() and not checkpoints.written() and not gate.is_set()
    answered = ask(checkpoints)
    assert whole(path)
    assert getattr(answered, "path", path) == path
    checkpoints.wait()


def test_what_takes_long_is_told_again_as_it_moves(run):
    """For the watchdog, which ends a run that says nothing for half an hour: each file that is written, hashed or read."""
    told: list[str] = []
    checkpoints = CheckpointManager(run, keep_last=0, keep_every=0, identity=manager(run).identity, on_phase=told.append)
    checkpoints.save(StubEngine(), state(4))
    files = len(list((run / "checkpoints/step_4").glob("*.pt")))
    assert told.count("saving: writing") > files and told[-1] == "saving: publishing"
    del told[:]
    choice = checkpoints.choose("auto")
    assert told.count("choosing a checkpoint") > files
    assert checkpoints.newest() == choice and told.count("choosing a checkpoint") > 2 * files
    del told[:]
    checkpoints.load(StubEngine(), choice)
    assert told.count("loading a checkpoint") > files
    assert len(set(told)) == 1


def test_a_wait_for_a_disk_that_moves_is_no_hang_and_one_for_a_disk_that_does_not_is(run, monkeypatch):
    looks: list[int] = []
    told: list[int] = []
    files = CheckpointFiles(run, name="step_4", later=True)
    future: Future[None] = Future()

    def look(_, timeout):
        looks.append(len(looks))
        if looks[-1] < 3:
            files.write("x", b"part")
            files.flush()
            files._waiting = []
        if looks[-1] == 9:
            future.set_result(None)
        return SimpleNamespace(done=future.done())

    monkeypatch.setattr("launch.checkpoint.manager.wait_for", look)
    checkpoints = CheckpointManager(
        run, keep_last=0, keep_every=0, identity=manager(run).identity, on_phase=lambda _: told.append(len(looks))
    )
    checkpoints._pending = future, files
    checkpoints.wait()
    assert told == [0, 1, 2, 3] and len(looks) == 10


def test_what_a_save_in_the_background_failed_with_is_said_once(run, monkeypatch):
    """And the next one is saved."""
    monkeypatch.setattr(CheckpointFiles, "flush", lambda self: (_ for _ in ()).throw(UserError("no space")))
    checkpoints = CheckpointManager(run, keep_last=0, keep_every=0, identity=manager(run).identity, background=True)
    checkpoints.save(StubEngine(), state(4))
    with pytest.raises(ValueError, match="no space"):
        checkpoints.newest()
    monkeypatch.undo()
    assert checkpoints.newest().path.name == "step_3"
    checkpoints.save(StubEngine(), state(4))
    checkpoints.wait()
    assert steps(run) == [1, 2, 3, 4] and not publish.leftovers(run / "checkpoints")


def test_what_deepspeed_does_not_load_is_no_resume(run, monkeypatch):
    choice = manager(run).choose("auto")
    monkeypatch.setattr(StubEngine, "load_checkpoint", lambda *_, **__: (None, {}))
    with pytest.raises(ValueError, match=r"DeepSpeed found nothing to load in .*step_3"):
        manager(run).load(StubEngine(), choice)


def test_a_fault_of_the_program_in_a_load_is_no_mistake_of_a_user(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shape mismatch")

    choice = manager(run).choose("auto")
    monkeypatch.setattr(StubEngine, "load_checkpoint", fail)
    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        manager(run).load(StubEngine(), choice)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_ranks_that_load_one_after_the_other_do_not_wait_for_each_other_at_a_file(run, one_by_one):
    """With `pipeline_loading_checkpoint`: each has its turn inside DeepSpeed."""
    choice, engine, together = manager(run).choose("auto"), StubEngine(), []
    engine._config.zero_config.pipeline_loading_checkpoint = one_by_one
    ranks = SimpleNamespace(rank=0, run_everywhere=lambda action: [together.append(action())])
    restore(engine, choice, choice.path, ranks)
    assert len(together) == (0 if one_by_one else 2)
    seen = []
    engine.load_checkpoint = lambda *_, **__: seen.append(engine._config.zero_config.pipeline_loading_checkpoint)
    engine.optimizer._load_universal_checkpoint = None
    restore(engine, replace(choice, conversions=("ep_size: 2 -> 1",)), choice.path, ranks)
    assert seen == [False], "of a conversion no rank tells the next one that it is its turn"
    assert engine._config.zero_config.pipeline_loading_checkpoint == one_by_one


def test_nothing_is_written_where_it_should_not_be_any_more(run):
    """The run's folder was moved away, and a save would make another."""

    def refuse():
        raise UserError("the folder is another")

    checkpoints = CheckpointManager(run, keep_last=1, keep_every=0, identity=manager(run).identity)
    checkpoints.before_save = refuse
    shutil.rmtree(run)
    with pytest.raises(ValueError, match="the folder is another"):
        checkpoints.save(StubEngine(), state(4))
    assert not run.exists()


def test_a_save_does_not_fail_over_what_is_no_longer_kept(run, monkeypatch, capsys):
    """It is mounted, or somebody else's; the new one is whole and named."""

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("launch.checkpoint.manager.discard", refuse)
    manager(run, keep_last=1).save(StubEngine(), state(4))
    assert steps(run) == [1, 2, 3, 4] and (run / "checkpoints/latest").read_text() == "step_4"
    drain()
    assert capsys.readouterr().err.count("is no longer kept and cannot be deleted (Permission denied)") == 3


# ---------------------------------------------------------------------- a full disk


def test_too_little_space_is_seen_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match=r"step_4 needs .* GB free; make room"):
        manager(run).save(StubEngine(), state(4))
    assert steps(run) == [1, 2, 3]
    assert not publish.leftovers(run / "checkpoints")


def test_the_space_that_is_needed_is_that_of_all_ranks(run, monkeypatch):
    """Two, and room for one and a half: each would find its own share to fit."""
    engine, checkpoints = StubEngine(), manager(run)
    monkeypatch.setattr(checkpoints._ranks, "gather", lambda value: [value] * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1.5 * state_bytes(engine)))
    with pytest.raises(ValueError, match=r"step_4 needs .* GB free; make room"):
        checkpoints.save(engine, state(4))


@pytest.mark.parametrize("fits", [True, False])
def test_a_save_needs_a_little_more_than_its_tensors(run, monkeypatch, fits):
    """Its files have headers, buffers, random states."""
    engine = StubEngine()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1.051 if fits else 1.049) * state_bytes(engine)))
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"step_4 needs .* GB free; make room"):
        manager(run).save(engine, state(4))


@pytest.mark.parametrize("limit", [1, 500, 1500, 2500, 4000])
def test_a_disk_that_fills_up_while_writing_leaves_the_old_ones(run, limit):
    """By RLIMIT_FSIZE: a write beyond so many bytes of a file fails, as it does without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = manager(run, keep_last=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises((ValueError, OSError)):
            checkpoints.save(StubEngine(), state(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert steps(run) == [1, 2, 3]
    assert all(whole(run / f"checkpoints/step_{step}") for step in (1, 2, 3))
    assert manager(run).choose("auto").path.name == "step_3"
    checkpoints.save(StubEngine(), state(4))  # once there is room again
    assert steps(run) == [4]
    assert not publish.leftovers(run / "checkpoints")


@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.ENOTCONN, errno.EBUSY, errno.EIO])
@pytest.mark.parametrize("when", ["make_folder", "write_manifest", "publish"])
def test_a_hiccup_of_the_disk_at_any_part_of_a_save_is_no_fault_of_the_program(run, monkeypatch, when, code):
    def hiccup(*_, **__):
        raise OSError(code, os.strerror(code))

    checkpoints = manager(run)
    with monkeypatch.context() as now, pytest.raises(AgreedError, match=os.strerror(code)):
        now.setattr(manager_module, when, hiccup)
        checkpoints.save(StubEngine(), state(4))
    checkpoints.save(StubEngine(), state(5))
    assert 5 in steps(run)


def test_what_a_failed_save_has_published_is_of_the_run_s_own_branch(run, monkeypatch):
    """The pointer could not be written: the next save took step 2 for one of the branch that was left."""
    checkpoints = manager(run)
    checkpoints.load(StubEngine(), checkpoints.choose("step_1"))
    with monkeypatch.context() as now, pytest.raises(AgreedError):
        now.setattr(type(checkpoints.folder), "point", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        checkpoints.save(StubEngine(), state(2))
    checkpoints.save(StubEngine(), state(4))
    assert checkpoints.folder.left() == {"step_3"} and checkpoints.folder.pointed("latest") == "step_4"


def test_what_a_failed_save_moved_aside_is_put_back_by_the_next(run):
    """The first of its two renames was done and the second was not; what dead saves left is deleted."""
    saved = run / "checkpoints" / "step_3"
    saved.rename(publish.working_name(saved, "replaced"))
    manager(run).save(StubEngine(), state(4))
    assert steps(run) == [1, 2, 3, 4] and whole(saved)


# ---------------------------------------------------------------------- SIGKILL at every file operation of a save


def save_in_child(run: Path, step: int, moment: int, **options) -> int | None:
    """The signal that ended the child, or None where it finished."""
    checkpoints = CheckpointManager(run, keep_every=0, identity=manager(run).identity, **options)
    return in_child(run, moment, lambda: checkpoints.save(StubEngine(seed=step), state(step), is_best=True))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("step", "exchange"), [(4, True), (3, True), (3, False)], ids=["new", "again", "again-two-renames"])
def test_a_kill_at_any_moment_of_a_save_loses_nothing(three, memory, monkeypatch, step, exchange, stride):
    """A new step with an old one going away, and a step saved again: after every kill the newest is whole and found."""
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    outcomes = []
    for moment in range(step % stride, 400, stride):
        run = memory / f"run{moment}"
        shutil.copytree(three, run)
        killed = save_in_child(run, step, moment, keep_last=2)
        named = (run / "checkpoints/latest").read_text()
        if exchange or (run / "checkpoints" / named).exists():
            assert whole(run / "checkpoints" / named), f"after a kill at {moment} latest names {named}, which is not whole"
        best = manager(run).folder.pointed("best")
        assert named == "step_3" or best == named, f"after a kill at {moment} latest has the best loss and best names {best}"
        choice = manager(run).choose("auto")
        assert choice.state.step >= 3 and "passed over" not in choice.message, (moment, choice.message)
        outcomes.append((choice.state.step, choice.state == state(choice.state.step)))
        manager(run, keep_last=2).save(StubEngine(), state(5))
        assert not publish.leftovers(run / "checkpoints")
        assert len(steps(run)) <= 3
        shutil.rmtree(run)
        if killed is None:
            break
        assert killed == signal.SIGKILL
    print(f"{moment} kills")
    assert killed is None and moment > 50, f"{moment} kills struck; the last save was to finish"
    assert {step for step, _ in outcomes} == {3, step}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "buffers.pt", "rng_00000.pt"])
def test_a_disk_that_gives_other_bytes_the_second_time_is_refused(run, name):
    """Whole when it was verified, another bit when it is loaded."""
    checkpoints, engine = manager(run), StubEngine(seed=9)
    choice = checkpoints.choose("auto")
    data = bytearray((choice.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (choice.path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} reads otherwise than when it was verified a moment ago"):
        checkpoints.load(engine, choice)


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_resumes_in_a_row_under_a_clock_that_runs_backwards(tmp_path, monkeypatch, times):
    """Nothing adds up, nothing is left behind, and no file's time decides anything."""
    clock = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    run, first = tmp_path / "run", StubEngine(seed=1)
    manager(run, keep_last=2).save(first, state(1))
    handles = len(os.listdir("/proc/self/fd"))
    for step in range(2, times + 2):
        engine, checkpoints = StubEngine(seed=step), manager(run, keep_last=2)
        choice = checkpoints.choose("auto")
        assert checkpoints.load(engine, choice).step == step - 1
        checkpoints.save(engine, state(step))
        saved = run / "checkpoints" / f"step_{step}"
        os.utime(saved, (next(clock), next(clock)))
    assert sorted(os.listdir(run / "checkpoints")) == sorted(["latest", f"step_{times}", f"step_{times + 1}"])
    assert len(os.listdir("/proc/self/fd")) == handles
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, engine.module.state_dict()[name]), name
