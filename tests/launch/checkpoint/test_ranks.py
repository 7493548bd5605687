"""Faults that strike one rank of several: all ranks agree, nobody waits for ever, the next start is to the bit."""

import random
import shutil
import signal
import time

import pytest
from training_process import launch_ranks, start_ranks

from launch import manifest


@pytest.fixture(scope="module")
def found(nursery, tmp_path_factory):
    return launch_ranks(nursery, 2, "rank_faults", folder=tmp_path_factory.mktemp("runs"))


def test_a_full_disk_of_one_rank_fails_the_save_on_all(found):
    first, second = found["full_disk"]
    assert first == second
    assert first.startswith("rank 1: writing") and "File too large" in first
    assert found["after_full_disk"] == ["latest", "step_2"]


def test_a_file_that_one_rank_cannot_read_is_passed_over_by_all(found):
    first, second = found["hole"]
    assert first == second
    assert "step_4/zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read" in first
    assert found["from_step"] == [2, 2]


def test_the_run_goes_on_to_the_bit_after_all_that(found):
    assert found["trained"] == found["expected"]
    assert found["digests"][0] == found["digests"][1]


def test_a_refusal_is_the_same_sentence_on_all_ranks(found):
    first, second = found["refusal"]
    assert first == second
    assert 'data: "made up" -> "other data"' in first


def test_a_shard_that_one_rank_cannot_use_is_refused_by_all_at_once(nursery, tmp_path):
    """Under ZeRO 3 the others waited for it inside DeepSpeed, until the stall timeout ended them all."""
    first, second = launch_ranks(nursery, 2, "unusable_shard", folder=tmp_path)
    assert first == second and first.startswith("rank 1: ") and "holds numbers that are not finite" in first


KILLS = [(1, "saving: writing"), (0, "saving: publishing"), (1, "saving: publishing"), (0, "saving: preparing")]


@pytest.mark.parametrize(("rank", "phase"), [KILLS[0], *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS[1:])])
def test_a_rank_killed_in_a_save_ends_the_others_and_loses_nothing(nursery, tmp_path, rank, phase):
    ranks = start_ranks(nursery, 2, "save_and_die", folder=tmp_path / "run", rank=rank, phase=phase)
    codes = ranks.wait(120)
    assert codes[rank] == -signal.SIGKILL, "the fault did not strike"
    assert codes[1 - rank] not in (0, -signal.SIGKILL), "the other rank was to notice by itself"
    named = (tmp_path / "run/checkpoints/latest").read_text()
    files = manifest.read_manifest(tmp_path / "run/checkpoints" / named)["files"]
    manifest.check_files(tmp_path / "run/checkpoints" / named, files, files)
    layout = {"stage": 2, "dtype": "float32", "ep": 2}
    [step], *resumed = launch_ranks(nursery, 2, "go_on", folder=tmp_path / "run", steps=2, **layout)
    assert step in (2, 3)
    [start], *whole = launch_ranks(nursery, 2, "go_on", folder=tmp_path / "uninterrupted", steps=step + 2, **layout)
    assert start == 0
    assert resumed == whole[step:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_kill_of_all_ranks_in_a_conversion_loses_nothing(nursery, tmp_path, seed):
    """At a random moment; the converter's own processes must end too, and the next start converts anew."""
    made = launch_ranks(nursery, 2, "make", folder=tmp_path, kinds=[(2, "float32")], ep=2)["zero2-float32"]
    run, started = tmp_path / "zero2-float32", tmp_path / "started"
    before = {p.name: p.read_bytes() for p in (run / "checkpoints/step_3").iterdir()}
    ranks = start_ranks(nursery, 2, "convert_and_tell", folder=run, started=started)
    while not started.exists():
        assert not ranks.poll(), ranks.text()
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 8) if seed else 0.5)  # on a fast machine seven seconds are too late
    running = not ranks.poll()
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert {p.name: p.read_bytes() for p in (run / "checkpoints/step_3").iterdir()} == before
    shutil.copytree(run, tmp_path / "again" / "zero2-float32")
    taken = launch_ranks(nursery, 2, "take", folder=tmp_path / "again", cases=[["zero2-float32", 2, "float32", 1]])
    result = taken["zero2-float32-to-zero2-float32-ep1"]
    assert result["state"] == made["state"] and result["bias"] == made["bias"]
    assert result["after_save"] == ["best", "latest", "step_3", "step_4"]
    assert running or seed, "the first kill strikes while the ranks are at it"
