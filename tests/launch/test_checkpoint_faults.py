"""What may happen to a run's folder, and what the next start makes of it. One process and a stub engine; the faults that
need real ranks are in `test_checkpoint_ranks.py`."""

import json
import os
import random
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_at import in_child
from stub_engine import MODEL, OPTIMIZER, StubEngine, manager, state, steps

from launch import integrity
from launch.checkpoint import CheckpointManager


def whole(folder: Path) -> bool:
    manifest, damage = integrity.attempt(lambda: integrity.read_manifest(folder))
    return not damage and not integrity.attempt(lambda: integrity.check_files(folder, manifest["files"], manifest["files"]))[1]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with step_1, step_2, step_3, each of another engine."""
    run = tmp_path_factory.mktemp("runs") / "run"
    for step in (1, 2, 3):
        manager(run).save(StubEngine(seed=step), state(step))
    return run


@pytest.fixture
def run(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------- what is kept


def test_state_and_engine_come_back(run):
    engine, checkpoints = StubEngine(seed=50), manager(run)
    checkpoints.save(engine, state(7, guard=[0.1, 1e-300, 3], wandb_id="x"))
    drawn = [torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal()]
    other = StubEngine(seed=51)
    loaded = checkpoints.load(other, manager(run).find("auto"))
    assert loaded == state(7, guard=[0.1, 1e-300, 3], wandb_id="x")
    again = [torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.standard_normal()]
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name
    assert other.module[1].num_batches_tracked == 51  # it is saved as it was, and an int64 buffer stays one


def test_retention(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2, 3, 4, 5, 6, 7):
        manager(run, keep_last=2, keep_every=3).save(StubEngine(), state(step), is_best=step == 2)
    assert steps(run) == [2, 3, 6, 7]  # 2 is the best, 3 and 6 are multiples, 6 and 7 the newest
    assert (run / "checkpoints/latest").read_text() == "step_7"
    assert (run / "checkpoints/best").read_text() == "step_2"
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_file()) == ["best", "latest"]


def test_going_on_from_an_older_one_neither_counts_nor_deletes_what_lies_beyond(run):
    checkpoints = manager(run, keep_last=1)
    (run / "checkpoints/latest").write_text("step_1")
    verdict = checkpoints.find("auto")
    assert verdict.state.step == 1
    shutil.rmtree(run / "checkpoints/step_2")
    checkpoints.save(StubEngine(), state(2))
    assert steps(run) == [2, 3]
    assert manager(run).find("auto").state.step == 2


def test_saving_a_step_again_replaces_it(run):
    manager(run).save(StubEngine(seed=77), state(3, again=True))
    assert manager(run).find("auto").state.extra == {"again": True}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_1", "step_2", "step_3"]


# ---------------------------------------------------------------------- which one is taken


@pytest.mark.parametrize("pointer", [None, "", "\n", "step_", "garbage\x00", "step_9", "../../etc", b"\xff\xfe\x00"])
def test_a_bad_pointer_falls_back_to_the_newest_whole_one(run, pointer):
    latest = run / "checkpoints/latest"
    latest.unlink()
    if pointer is not None:
        latest.write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    assert manager(run).find("auto").path.name == "step_3"


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "buffers.pt", "rng_00000.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_names_the_file(run, name, damage):
    path = run / "checkpoints/step_3" / name
    hurt(path, damage)
    verdict = manager(run).find("auto")
    assert verdict.path.name == "step_2"
    assert f"passed over {path}" in verdict.message
    with pytest.raises(ValueError, match=name):  # asked for by name there is no other to take
        manager(run).find(str(path.parent))


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
        manager(run).find("auto")
    assert all(f"step_{step}/state.json" in str(caught.value) for step in (1, 2, 3))
    for step in (1, 2, 3):
        shutil.rmtree(run / f"checkpoints/step_{step}")
    with pytest.raises(ValueError, match="'step_3', which is gone"):
        manager(run).find("auto")


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    for resume in ("auto", "never"):
        verdict = manager(tmp_path).find(resume)
        assert not verdict.resumes
        assert verdict.message == "starting at step 0"
    assert manager(tmp_path).latest() is None
    assert not list(tmp_path.iterdir()), "looking changes nothing"


def test_never_does_not_mix_two_runs(run):
    with pytest.raises(ValueError, match="holds step_3"):
        manager(run).find("never")


def test_a_path_may_be_a_checkpoint_a_run_or_a_name(run, tmp_path):
    elsewhere = tmp_path / "another"
    assert manager(run).find("step_1").path.name == "step_1"
    for path, name in ((run / "checkpoints/step_2", "step_2"), (run, "step_3"), (run / "checkpoints", "step_3")):
        assert manager(run).find(str(path)).path.name == name
        assert manager(elsewhere).find(str(path)).path.name == name
    with pytest.raises(ValueError, match="no checkpoint there"):
        manager(run).find(str(tmp_path / "nothing"))


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
        manager(run, **change).find("auto")
    assert words in str(caught.value)


def test_what_says_nothing_about_the_weights_may_differ(run):
    model = {"hidden_size": 8, "rope_parameters": {"factor": 2.0}, "transformers_version": "9.9.9", "use_cache": False}
    assert manager(run, model=model).find("auto").resumes


def test_another_layout_asks_for_a_conversion(run):
    verdict = manager(run, ep_size=4, world_size=8).find("auto")
    assert verdict.conversions == ("ep_size: 1 -> 4", "world_size: 1 -> 8")
    assert verdict.deepspeed_config({"checkpoint": {"tag_validation": "Ignore"}, "a": 1}) == {
        "checkpoint": {"tag_validation": "Ignore", "load_universal": True},
        "a": 1,
    }
    assert manager(run).find("auto").deepspeed_config({"a": 1}) == {"a": 1}


def test_what_cannot_be_converted_is_refused_with_the_reason(run, tmp_path):
    with pytest.raises(ValueError, match="ZeRO 0 converts in float32 only"):
        manager(run, zero_stage=0, dtype="bfloat16").find("auto")
    engine = StubEngine()
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), momentum=0.9)
    engine.optimizer.step()
    manager(tmp_path / "sgd").save(engine, state(1))
    with pytest.raises(ValueError, match=r"momentum_buffer.*only Adam's moments convert"):
        manager(tmp_path / "sgd", ep_size=2).find("auto")
    assert manager(tmp_path / "sgd").find("auto").resumes


def test_a_newer_format_is_refused_not_passed_over(run):
    folder = run / "checkpoints/step_3"
    body = json.loads((folder / "state.json").read_text())
    manifest = integrity.read_manifest(folder)
    record = integrity.write_durably(folder / "state.json", integrity.to_json({**body, "format": 2}))
    integrity.write_manifest(folder, {**manifest["files"], "state.json": record})
    with pytest.raises(ValueError, match="format 2, made by a newer version"):
        manager(run).find("auto")


def test_code_in_a_checkpoint_is_not_run(run):
    """Whoever can write the files can write the manifest: the checksums are no protection here."""
    folder, struck = run / "checkpoints/step_3", run / "struck"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(struck),)

    for name in ("mp_rank_00_model_states.pt", "buffers.pt", "rng_00000.pt"):
        kept = (folder / name).read_bytes()
        torch.save({"x": Malicious()}, folder / name)
        files = integrity.read_manifest(folder)["files"]
        integrity.write_manifest(folder, {**files, name: integrity.record_file(folder / name)})
        with pytest.raises(Exception, match="Weights only load failed"):
            checkpoints = manager(run)
            checkpoints.load(StubEngine(), checkpoints.find("auto"))
        assert not struck.exists()
        (folder / name).write_bytes(kept)
        integrity.write_manifest(folder, files)
    torch.load(folder / "buffers.pt", weights_only=True)


# ---------------------------------------------------------------------- a full disk


def test_too_little_space_is_seen_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match=r"step_4 needs .* GB free; make room"):
        manager(run).save(StubEngine(), state(4))
    assert steps(run) == [1, 2, 3]
    assert not integrity.leftovers(run / "checkpoints")


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
    assert manager(run).find("auto").path.name == "step_3"
    checkpoints.save(StubEngine(), state(4))  # once there is room again
    assert steps(run) == [4]
    assert not integrity.leftovers(run / "checkpoints")


# ---------------------------------------------------------------------- SIGKILL at every file operation of a save


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: hundreds of fsyncs of a busy disk take minutes, and the order is what counts."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def save_in_child(run: Path, step: int, moment: int, **options) -> int | None:
    """The signal that ended the child, or None where it finished."""
    checkpoints = CheckpointManager(run, keep_every=0, identity=manager(run).identity, **options)
    return in_child(run, moment, lambda: checkpoints.save(StubEngine(seed=step), state(step), is_best=True))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("step", "exchange"), [(4, True), (3, True), (3, False)], ids=["new", "again", "again-two-renames"])
def test_a_kill_at_any_moment_of_a_save_loses_nothing(three, memory, monkeypatch, step, exchange, stride):
    """A new step with an old one going away, and a step saved again: after every kill the newest is whole and found."""
    if not exchange:
        monkeypatch.setattr(integrity, "exchange", lambda *_: False)
    outcomes = []
    for moment in range(step % stride, 400, stride):
        run = memory / f"run{moment}"
        shutil.copytree(three, run)
        killed = save_in_child(run, step, moment, keep_last=2)
        named = (run / "checkpoints/latest").read_text()
        if exchange or (run / "checkpoints" / named).exists():
            assert whole(run / "checkpoints" / named), f"after a kill at {moment} latest names {named}, which is not whole"
        verdict = manager(run).find("auto")
        assert verdict.state.step >= 3 and "passed over" not in verdict.message, (moment, verdict.message)
        outcomes.append((verdict.state.step, verdict.state == state(verdict.state.step)))
        manager(run, keep_last=2).save(StubEngine(), state(5))
        assert not integrity.leftovers(run / "checkpoints")
        assert len(steps(run)) <= 3
        shutil.rmtree(run)
        if killed is None:
            break
        assert killed == signal.SIGKILL
    print(f"{moment} kills")
    assert killed is None and moment > 50, f"{moment} kills struck; the last save was to finish"
    assert {step for step, _ in outcomes} == {3, step}
