"""What the next start makes of a run's folder: which checkpoint it takes, and what it refuses."""

import contextlib
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stub_engine import MODEL, OPTIMIZER, StubEngine, manager, state, steps

from data.cli import UserError
from data.files import hash_file
from launch import manifest
from launch.checkpoint import folder as folder_module
from launch.checkpoint import universal
from launch.checkpoint.choose import ResumeFrom, StartFresh


@pytest.mark.parametrize("pointer", [None, "", "\n", "step_", "garbage\x00", "step_9", "../../etc", b"\xff\xfe\x00"])
def test_a_bad_pointer_falls_back_to_the_newest_whole_one(run, pointer):
    latest = run / "checkpoints/latest"
    latest.unlink()
    if pointer is not None:
        latest.write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    assert manager(run).choose("auto").path.name == "step_3"


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "buffers.pt", "rng_00000.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_names_the_file(run, name, damage):
    path = run / "checkpoints/step_3" / name
    hurt(path, damage)
    choice = manager(run).choose("auto")
    assert choice.path.name == "step_2"
    assert f"passed over {path}" in choice.message
    with pytest.raises(ValueError, match=name):  # asked for by name there is no other to take
        manager(run).choose(str(path.parent))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "buffers.pt", "rng_00000.pt", "state.json"])
def test_each_file_is_hashed_by_one_of_two_ranks_and_what_either_finds_counts(run, name):
    hurt(run / "checkpoints/step_3" / name, "flip")
    found, chooser = [], manager(run)._chooser
    for rank in (0, 1):

        def run_everywhere(action, rank=rank):
            own = action()
            found.append(own)
            return [own, ""] if rank == 0 else ["", own]

        chooser.ranks = SimpleNamespace(rank=rank, size=2, run_on_rank0=lambda action: action(), run_everywhere=run_everywhere)
        assert chooser._first_damage(run / "checkpoints/step_3") == found[-1]
    assert sorted(name in text for text in found) == [False, True]


def test_a_newest_that_is_gone_is_told(run):
    assert "which is gone" not in manager(run).choose("auto").message
    (run / "checkpoints/step_3").rename(run / "elsewhere")
    (run / "checkpoints/step_3").symlink_to("/not/mounted")
    choice = manager(run).choose("auto")
    assert choice.path.name == "step_2" and choice.message.endswith("; latest names step_3, which is gone")


def test_what_dead_processes_left_is_gone_before_room_is_asked_for(run):
    """Each killed conversion left more, and the next start was refused for want of room."""
    folder = run / "checkpoints"
    for name in (".tmp-step_4-0123abcd", ".tmp-step_3.universal-0123abcd", ".trash-step_1-0123abcd"):
        (folder / name).mkdir()
    (folder / "step_2").rename(folder / ".replaced-step_2-0123abcd")
    manager(run).choose("auto")
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_1", "step_2", "step_3"]


def test_a_checkpoint_in_a_folder_that_deepspeed_takes_for_a_pattern_is_refused(run):
    with pytest.raises(UserError, match=r"DeepSpeed takes \[, \* and \? in a path for a pattern"):
        manager(run.parent / "new").choose(str(run.rename(run.parent / "run[1]") / "checkpoints/step_2"))


def hurt(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "remove":
        return path.unlink()
    data[len(data) // 3] ^= 16
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])


def test_folders_of_which_none_is_whole_are_refused_never_a_silent_step_0(run):
    for step in (1, 2, 3):
        hurt(run / f"checkpoints/step_{step}/state.json", "flip")
    with pytest.raises(ValueError, match="no whole checkpoint") as caught:
        manager(run).choose("auto")
    assert all(f"step_{step}/state.json" in str(caught.value) for step in (1, 2, 3))
    for step in (1, 2, 3):
        shutil.rmtree(run / f"checkpoints/step_{step}")
    with pytest.raises(ValueError, match="'step_3', which is gone"):
        manager(run).choose("auto")


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    for resume in ("auto", "never"):
        choice = manager(tmp_path).choose(resume)
        assert isinstance(choice, StartFresh)
        assert choice.message == "starting at step 0"
    assert manager(tmp_path).newest() is None
    assert not list(tmp_path.iterdir()), "looking changes nothing"


def test_the_newest_before_a_step_is_of_a_step_before_it(run):
    assert [manager(run).newest(before=step).path.name for step in (4, 3, 2)] == ["step_3", "step_2", "step_1"]
    assert manager(run).newest(before=1) is None and manager(run).newest().path.name == "step_3"


def test_never_does_not_mix_two_runs(run):
    with pytest.raises(ValueError, match="holds step_3"):
        manager(run).choose("never")


def test_a_path_may_be_a_checkpoint_a_run_or_a_name(run, tmp_path):
    elsewhere = tmp_path / "another"
    assert manager(run).choose("step_1").path.name == "step_1"
    for path, name in ((run / "checkpoints/step_2", "step_2"), (run, "step_3"), (run / "checkpoints", "step_3")):
        for asking, own in ((run, True), (elsewhere, False)):
            choice = manager(asking).choose(str(path))
            assert (choice.path.name, choice.is_own) == (name, own)
    with pytest.raises(ValueError, match="no checkpoint there"):
        manager(run).choose(str(tmp_path / "nothing"))


def test_a_name_is_looked_for_where_the_command_stands_first(run, tmp_path, monkeypatch):
    """As of any path; and a run is its folder of checkpoints, whatever a person has laid beside that."""
    shutil.copytree(run, tmp_path / "another")
    monkeypatch.chdir(tmp_path / "another" / "checkpoints")
    choice = manager(run).choose("step_2")
    assert choice.place == os.path.realpath("step_2") and choice.path == run / "checkpoints" / "step_3"
    shutil.copytree(run / "checkpoints" / "step_1", run / "step_1")
    assert manager(tmp_path / "second").choose(str(run)).path.name == "step_3"


def test_what_lies_in_the_way_of_a_save_is_said_at_the_start(run):
    (run / "checkpoints" / "best").mkdir()
    for resume in ("auto", "never", "step_1"):
        with pytest.raises(ValueError, match="best is a folder and must be a file that names one"):
            manager(run).choose(resume)


def test_another_runs_folder_is_read_and_not_put_right(run, tmp_path):
    """It may be training: between the two renames of its save, what is put back would be in the second one's way."""
    aside = run / "checkpoints" / ".replaced-step_3-0123abcd"
    (run / "checkpoints" / "step_3").rename(aside)
    assert manager(tmp_path / "second").choose(str(run)).path.name == "step_2" and aside.is_dir()
    assert manager(run).choose("auto").path.name == "step_3" and not aside.exists()


def begin(run, resume):
    """A start of a run, up to its first step."""
    manager_ = manager(run)
    choice = manager_.choose(resume)
    manager_.load(StubEngine(), choice)
    manager_.begin(choice)
    return manager_, choice


def test_a_job_that_is_queued_again_goes_on_and_does_not_begin_at_its_path_once_more(run, tmp_path):
    """It repeats its command: each start went back to the path, and ended where the path's checkpoint was deleted meanwhile."""
    second = tmp_path / "second"
    for asking, path in ((run, "step_2"), (second, str(run)), (tmp_path / "third", str(run / "checkpoints/step_1"))):
        branch, choice = begin(asking, path)
        again = begin(asking, path)[1]  # it ended before it had saved
        assert again.path.samefile(choice.path) and again.state == choice.state
        branch.save(StubEngine(seed=7), state(7))
        queued = begin(asking, path)[1]
        assert queued.path == asking / "checkpoints/step_7" and queued.is_own
        assert f"an earlier start began at --resume {path}" in queued.message
    shutil.rmtree(run / "checkpoints/step_2")
    shutil.rmtree(run / "checkpoints/step_1")
    assert begin(run, "step_2")[1].path.name == begin(tmp_path / "third", path)[1].path.name == "step_7"


def test_a_path_in_the_run_itself_is_where_it_begins_as_often_as_it_is_meant(run):
    """Another path, the same after --resume auto, or the same without the note."""
    for resume, note in (("step_2", ""), ("step_1", ""), ("auto", ""), ("step_1", ""), ("step_1", "gone")):
        if note:
            (run / "checkpoints/resumed").unlink()
        branch, choice = begin(run, resume)
        assert resume in ("auto", choice.path.name)
        branch.save(StubEngine(seed=3), state(3))


def test_a_run_with_checkpoints_of_its_own_goes_on_from_them(run, tmp_path):
    second = tmp_path / "second"
    manager(second).save(StubEngine(), state(2))
    choice = manager(second).choose(str(run))
    assert choice.path == second / "checkpoints/step_2" and "has checkpoints of its own" in choice.message
    begin(second, str(run))
    own = manager(run).choose(str(run))
    assert (own.path.name, own.place) == ("step_3", None), "its own folder is no other run, and goes on as auto does"
    shutil.rmtree(run)
    assert begin(second, str(run))[1].path == second / "checkpoints/step_2", "once more, where the path is gone since"


def test_a_rollback_does_not_go_beyond_what_latest_names(run):
    """Not where that one is damaged either: what lies beyond is of a branch that was left."""
    (run / "checkpoints/latest").write_text("step_1")
    assert manager(run).newest().path.name == "step_1"
    hurt(run / "checkpoints/step_1/state.json", "flip")
    assert manager(run).newest() is None


def test_a_branch_that_was_left_does_not_come_back(run):
    """Before the first save of the new one a rollback, and the next start, took what lies beyond where it began."""
    branch, _ = begin(run, "step_1")
    assert branch.newest(before=3).path.name == "step_1"
    assert begin(run, "auto")[1].path.name == "step_1" and steps(run) == [1, 2, 3]


def test_a_branch_that_was_left_does_not_come_back_where_the_new_one_has_passed_it(run):
    """It was kept in the place of the new one's own, and gone on from once the newest was damaged."""
    begin(run, "step_1")[0].save(StubEngine(), state(5))
    assert manager(run).newest(before=5).path.name == "step_1"
    branch, _ = begin(run, "auto")
    branch.keep_last = 2
    branch.save(StubEngine(), state(6))
    assert steps(run) == [2, 3, 5, 6]
    hurt(run / "checkpoints/step_6/state.json", "flip")
    assert manager(run).choose("auto").path.name == "step_5"
    assert begin(run, "step_3")[1].path.name == "step_3", "by its name"
    hurt(run / "checkpoints/step_3/state.json", "flip")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        manager(run).choose("auto")


def test_what_was_damaged_is_left_when_there_is_something_newer_to_go_on_from(run):
    """Until then it may be restored."""
    state_json = run / "checkpoints/step_3/state.json"
    held = state_json.read_bytes()
    hurt(state_json, "flip")
    assert begin(run, "auto")[1].path.name == "step_2"
    state_json.write_bytes(held)
    assert manager(run).choose("auto").path.name == "step_3"
    hurt(state_json, "flip")
    branch, _ = begin(run, "auto")
    branch.save(StubEngine(), state(4))
    state_json.write_bytes(held)
    assert manager(run).newest(before=4).path.name == "step_2"
    branch.save(StubEngine(), state(3))
    assert manager(run).choose("auto").path.name == "step_3", "saved anew, it is of this branch"


def test_a_rollback_leaves_what_was_saved_among_the_skipped_steps(run):
    rolling = manager(run)
    rolling.load(StubEngine(), rolling.newest(before=2))
    rolling.save(StubEngine(), state(1, moved_on=True))
    rolling.save(StubEngine(), state(5))
    assert rolling.newest(before=5).state == state(1, moved_on=True)
    rolling.save(StubEngine(), state(6))
    assert rolling.newest(before=6).path.name == "step_5", "its own are not left"
    assert steps(run) == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(("resume", "step", "best"), [("step_1", 3, None), ("step_2", 2, None), ("auto", 3, "step_3")])
def test_best_names_no_other_weights_than_it_was_given_to(run, resume, step, best):
    """After a new branch had come by the step of the old one's best, an export of the best was of whatever was there now."""
    (run / "checkpoints/best").write_text("step_3")
    branch, _ = begin(run, resume)
    branch.save(StubEngine(), state(step))
    assert branch.folder.pointed("best") == best
    branch.save(StubEngine(), state(3), is_best=True)
    assert branch.folder.pointed("best") == "step_3"


@pytest.mark.parametrize("older", [False, True], ids=["", "saved by an older version"])
@pytest.mark.parametrize("how", ["resume", "rollback"])
def test_the_best_of_a_branch_is_one_of_its_own(tmp_path, how, older):
    """It stayed with the branch that was left: what this one had as its best was deleted, and `best` was of other weights."""
    run = tmp_path / "run"
    losses = {1: 3.0, 2: 3.0, 3: 2.0}  # 1 is the best up to 2
    first = manager(run, keep_last=1)
    for step, loss in losses.items():
        best_step = None if older else {1: 1, 2: 1, 3: 3}[step]
        first.save(StubEngine(seed=step), replace(state(step), best_loss=loss, best_step=best_step), is_best=step != 2)
        shutil.copytree(run / f"checkpoints/step_{step}", tmp_path / f"step_{step}")
    for step in (1, 2):
        shutil.copytree(tmp_path / f"step_{step}", run / f"checkpoints/step_{step}", dirs_exist_ok=True)
    branch = manager(run, keep_last=1)
    choice = branch.choose("step_2") if how == "resume" else branch.newest(before=3)
    assert branch.load(StubEngine(), choice).best_loss == 3.0
    if how == "resume":
        branch.begin(choice)
        assert branch.folder.pointed("best") == "step_1"
    branch.save(StubEngine(), replace(state(4), best_loss=3.0))
    assert branch.folder.pointed("best") == "step_1" and steps(run) == [1, 3, 4]


def two_branches(run, *, older=False):
    """One of steps 1, 4, 5 with its best at 4; and from step 1 on another of steps 1, 2, 3 with its best at 2."""

    def save(checkpoints, step, best_step, loss):
        held = replace(state(step), best_loss=loss, best_step=None if older else best_step)
        checkpoints.save(StubEngine(seed=step), held, is_best=step == best_step)

    first = manager(run)
    for step, best_step, loss in ((1, 1, 3.0), (4, 4, 2.0), (5, 4, 2.0)):
        save(first, step, best_step, loss)
    second, _ = begin(run, "step_1")
    for step in (2, 3):
        save(second, step, 2, 2.5)
    return second


@pytest.mark.parametrize(("resume", "older"), [("step_4", False), ("step_4", True), ("step_5", False)])
def test_a_branch_that_is_taken_up_again_has_its_own_best(tmp_path, resume, older):
    """What `best` named was of a step below, and of the branch now left: an export of the best was of the worse one."""
    run = tmp_path / "run"
    assert two_branches(run, older=older).folder.pointed("best") == "step_2"
    again = manager(run)
    choice = again.choose(resume)
    assert again.load(StubEngine(), choice).best_loss == 2.0
    again.begin(choice)
    assert again.folder.pointed("best") == "step_4"
    again.save(StubEngine(), replace(choice.state, step=6, samples=96))
    assert again.folder.pointed("best") == "step_4"


@pytest.mark.parametrize("as_best", [False, True])
def test_a_branch_whose_best_was_written_over_has_none(tmp_path, as_best):
    run, held = tmp_path / "run", replace(state(4), best_loss=2.1 if as_best else 2.5, best_step=4 if as_best else 2)
    two_branches(run).save(StubEngine(), held, is_best=as_best)
    again = manager(run)
    choice = again.choose("step_5")
    loaded = again.load(StubEngine(), choice)
    assert (loaded.best_loss, loaded.best_step) == (None, None), "the next evaluation has a checkpoint"
    again.begin(choice)
    assert again.folder.pointed("best") is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_best_loss_of_step_0_is_no_checkpoints(tmp_path, elsewhere):
    """The first to carry the number became `best`, though it had been judged worse; elsewhere it was forgotten, and --patience
    began anew."""
    run = tmp_path / "run"
    for step in (2, 3):
        manager(run).save(StubEngine(), replace(state(step), best_loss=2.0, best_step=0))
    again = manager(tmp_path / "other" if elsewhere else run)
    choice = again.choose(str(run))
    assert again.load(StubEngine(), choice) == replace(state(3), best_loss=2.0, best_step=0)
    again.begin(choice)
    assert again.folder.pointed("best") is None
    again.save(StubEngine(), replace(state(4), best_loss=2.0, best_step=0))
    assert again.folder.pointed("best") is None


def test_a_best_that_is_gone_is_looked_for_anew(tmp_path):
    """Also by a run that begins at another run's checkpoint: it had a best loss and no checkpoint with it."""
    run = tmp_path / "run"
    for step in (1, 2):
        manager(run).save(StubEngine(), replace(state(step), best_loss=3.0), is_best=step == 1)
    other = manager(tmp_path / "other")
    assert other.load(StubEngine(), other.choose(str(run))).best_loss is None
    again = manager(run)
    assert again.load(StubEngine(), again.choose("auto")).best_loss == 3.0
    shutil.rmtree(run / "checkpoints/step_1")
    (run / "checkpoints/best").unlink()
    assert again.load(StubEngine(), again.choose("auto")).best_loss == 3.0, "step_2 is as good"
    branch, _ = begin(run, "auto")
    assert branch.folder.pointed("best") == "step_2"


def test_a_best_that_nobody_can_read_is_none(tmp_path):
    """It need not be whole for the run to go on."""
    run = tmp_path / "run"
    for step in (1, 2):
        manager(run).save(StubEngine(), replace(state(step), best_loss=3.0, best_step=1), is_best=step == 1)
    (run / "checkpoints/step_1/state.json").write_text("{")
    again = manager(run)
    assert again.load(StubEngine(), again.choose("auto")).best_loss is None


def test_a_fresh_start_writes_over_nothing_that_was_left(run):
    """`--resume never` looked past it, and so did auto, once what a left step had led to was gone."""
    begin(run, "step_1")
    begin(run, "step_3")
    shutil.rmtree(run / "checkpoints/step_3")
    with pytest.raises(ValueError, match=r"--resume never, but .* holds step_"):
        manager(run).choose("never")
    for name in ("latest", "resumed"):
        (run / "checkpoints" / name).unlink()
        with pytest.raises(ValueError, match=r"step_1, step_2 are of branches that were left, for --resume to name"):
            manager(run).choose("auto")
    assert begin(run, "step_2")[1].path.name == "step_2"


@pytest.mark.parametrize(("resume", "writes"), [("step_1", 4), ("auto", 2)])
def test_a_kill_at_any_moment_while_a_branch_is_left_does_not_bring_it_back(run, memory, monkeypatch, resume, writes):
    """Where it begins, and in the first save. What is killed here is a write that is whole or absent, see `test_publish.py`."""
    held = {step: (run / f"checkpoints/step_{step}/state.json").read_bytes() for step in (2, 3)}
    for step in held if resume == "auto" else ():
        hurt(run / f"checkpoints/step_{step}/state.json", "flip")
    taken, replace = [], folder_module.replace_file
    for moment in range(writes + 1):
        folder, left = memory / str(moment), iter(range(moment))
        shutil.copytree(run, folder)

        def replace_file(path, content, left=left):
            if next(left, None) is None:
                raise Killed
            replace(path, content)

        monkeypatch.setattr(folder_module, "replace_file", replace_file)
        with contextlib.nullcontext() if moment == writes else pytest.raises(Killed):
            begin(folder, resume)[0].save(StubEngine(), state(5))
        monkeypatch.setattr(folder_module, "replace_file", replace)
        taken.append(begin(folder, "auto")[1].path.name)
        begin(folder, resume)[0].save(StubEngine(), state(6))
        for step, content in held.items():
            (folder / f"checkpoints/step_{step}/state.json").write_bytes(content)
        for saved in steps(folder)[3:]:
            hurt(folder / f"checkpoints/step_{saved}/state.json", "flip")
        assert manager(folder).choose("auto").path.name == "step_1", moment
    assert taken == {"step_1": ["step_3", *["step_1"] * 3, "step_5"], "auto": ["step_1", "step_5", "step_5"]}[resume]


class Killed(BaseException):
    """Caught by nothing."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "xyz"}, 'data: "abc" -> "xyz"'),
        ({"model": {"hidden_size": 8, "rope_parameters": {"factor": 4.0}}}, "model.rope_parameters.factor: 2.0 -> 4.0"),
        ({"sequence_length": 32}, "sequence_length: 16 -> 32"),
    ],
)
def test_another_model_or_data_is_refused_with_the_difference(run, change, words):
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        manager(run, **change).choose("auto")
    assert words in str(caught.value)


def test_what_says_nothing_about_the_weights_may_differ(run):
    model = {"hidden_size": 8, "rope_parameters": {"factor": 2.0}, "transformers_version": "9.9.9", "use_cache": False}
    assert isinstance(manager(run, model=model).choose("auto"), ResumeFrom)


def test_another_layout_asks_for_a_conversion(run):
    choice = manager(run, ep_size=4, world_size=8).choose("auto")
    assert choice.conversions == ("ep_size: 1 -> 4", "world_size: 1 -> 8")
    assert choice.message.endswith(", converted from another layout (ep_size: 1 -> 4, world_size: 1 -> 8)")
    assert choice.deepspeed_config({"checkpoint": {"tag_validation": "Ignore"}, "a": 1}) == {
        "checkpoint": {"tag_validation": "Ignore", "load_universal": True},
        "a": 1,
    }
    assert choice.deepspeed_config({"checkpoint": {"load_universal": False}}) == {"checkpoint": {"load_universal": True}}
    assert manager(run).choose("auto").deepspeed_config({"a": 1}) == {"a": 1}


def test_what_cannot_be_converted_is_refused_with_the_reason(run, tmp_path):
    with pytest.raises(ValueError, match="ZeRO 0 converts in float32 only"):
        manager(run, zero_stage=0, dtype="bfloat16").choose("auto")
    engine = StubEngine()
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), momentum=0.9)
    engine.optimizer.step()
    manager(tmp_path / "sgd").save(engine, state(1))
    with pytest.raises(ValueError, match=r"momentum_buffer.*only Adam's moments and Muon's momentum convert"):
        manager(tmp_path / "sgd", ep_size=2).choose("auto")
    assert isinstance(manager(tmp_path / "sgd").choose("auto"), ResumeFrom)


def test_what_is_no_adams_or_not_in_fp32_is_not_converted_whichever_side_it_is_on():
    adams, layout = {"state": ["exp_avg", "exp_avg_sq"]}, {"world_size": 2, "ep_size": 1}
    without = {**layout, "zero_stage": 0, "dtype": "bfloat16"}
    sharded = {**layout, "zero_stage": 2, "dtype": "bfloat16"}
    for saved, wanted in ((without, sharded), (sharded, without)):
        with pytest.raises(UserError, match="ZeRO 0 converts in float32 only"):
            universal.check_convertible(Path("step_3"), saved, wanted, adams)
    plain = {**layout, "zero_stage": 0, "dtype": "float32"}
    with pytest.raises(UserError, match=r"step_3/state\.json has no optimizer\.parameters, the order .*it was changed since"):
        universal.check_convertible(Path("step_3"), plain, {**plain, "world_size": 4}, adams)
    universal.check_convertible(Path("step_3"), plain, {**plain, "world_size": 4}, {**adams, "parameters": ["w"]})
    amsgrads = {"state": [*adams["state"], "max_exp_avg_sq"]}
    with pytest.raises(UserError, match=r"max_exp_avg_sq\) that only resumes in the layout"):
        universal.check_convertible(Path("step_3"), sharded, {**sharded, "world_size": 4}, amsgrads)


@pytest.mark.parametrize(("stages", "facts"), [((2, 3), {}), ((0, 2), {}), ((2, 2), {"offloaded": True})])
def test_muons_momentum_converts_where_it_is_whole(stages, facts):
    layout = {"world_size": 2, "ep_size": 1, "dtype": "float32"}
    saved, wanted = ({**layout, "zero_stage": stage} for stage in stages)
    facts = {"state": ["exp_avg", "exp_avg_sq", "momentum_buffer"], **facts}
    universal.check_convertible(Path("step_3"), saved, saved, facts)
    with pytest.raises(UserError, match="converts between ZeRO 1 and 2 without offload_optimizer"):
        universal.check_convertible(Path("step_3"), saved, {**wanted, "world_size": 1}, facts)
    universal.check_convertible(
        Path("step_3"), {**saved, "zero_stage": 1}, {**saved, "zero_stage": 2}, {**facts, "offloaded": False}
    )


def test_a_newer_format_is_refused_not_passed_over(run):
    folder = run / "checkpoints/step_3"
    body = json.loads((folder / "state.json").read_text())
    files = manifest.read_manifest(folder)["files"]
    (folder / "state.json").write_bytes(manifest.to_json({**body, "format": 2}))
    manifest.write_manifest(folder, {**files, "state.json": manifest.record_file(folder / "state.json")})
    with pytest.raises(ValueError, match="format 2, made by a newer version"):
        manager(run).choose("auto")


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_taken_and_stays(run, monkeypatch):
    """EIO once while it is hashed: it was passed over, and then replaced, days of training with it."""
    monkeypatch.setattr(manifest, "RETRY_AFTER", (0.0,))
    before = (run / "checkpoints/step_3").stat().st_ino
    hits = []

    def failing(path: Path, algorithm: str, on_read: object) -> str:
        hits.append(path)
        if len(hits) <= failures:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return hash_file(path, algorithm)

    monkeypatch.setattr(manifest, "hash_file", failing)
    failures = 1
    choice = manager(run).choose("auto")
    assert choice.path.name == "step_3" and "passed over" not in choice.message and len(hits) > 1
    hits.clear()
    failures = 1000
    with pytest.raises(ValueError, match=r"step_3.*cannot be read") as caught:
        manager(run).choose("auto")
    assert "damaged" not in str(caught.value)
    assert (run / "checkpoints/step_3").stat().st_ino == before and steps(run) == [1, 2, 3]
