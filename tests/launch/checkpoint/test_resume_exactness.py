"""Saving and resuming at the same topology, through real DeepSpeed engines on two ranks: to the bit."""

import pytest
from training_process import launch_ranks

KINDS = [(0, "float32"), (1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]


@pytest.fixture(scope="module")
def runs(nursery, tmp_path_factory):
    return launch_ranks(nursery, 2, "same_topology", folder=tmp_path_factory.mktemp("runs"), kinds=KINDS, ep=2)


@pytest.fixture(params=[f"zero{stage}-{dtype}" for stage, dtype in KINDS])
def run(request, runs):
    return runs[request.param]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run):
    assert run["resumed"] == run["uninterrupted"]  # losses, learning rates, random numbers of all generators
    assert run["middle"][0] == run["middle"][1]  # weights, moments and buffers of all ranks, after the first resumption
    assert run["digests"][0] == run["digests"][1]  # and after the second in a row
    assert run["counters"][0] == run["counters"][1]


def test_the_state_under_test_is_not_trivial(run):
    losses, rates, drawn = zip(*run["uninterrupted"], strict=True)
    assert len(set(losses)) == len(set(rates)) == len(set(drawn)) == len(losses)
    assert any(value != 0 for layer in run["bias_loaded"] for value in layer)


def test_the_folder_holds_what_the_design_says(run):
    assert {"state.json", "manifest.json", "buffers.pt", "rng_00000.pt", "rng_00001.pt"} <= set(run["files"])
    assert not [name for name in run["files"] if name.endswith(".py")]
    assert "step 5" in run["message"]


@pytest.fixture(scope="module")
def background(nursery, tmp_path_factory):
    return launch_ranks(nursery, 2, "in_the_background", folder=tmp_path_factory.mktemp("runs"), kinds=BACKGROUND)


BACKGROUND = [(2, "bfloat16"), (0, "float32")]


@pytest.mark.parametrize("kind", [f"zero{stage}-{dtype}" for stage, dtype in BACKGROUND])
def test_a_save_in_the_background_holds_the_step_it_was_asked_at(background, kind):
    run = background[kind]
    assert run["overlapped"] == [True, True], "training was to go on while the files were written"
    assert run["first_whole"] == [True, True], "a second save was to wait for the first"
    for rows, first in zip(run["resumed"], (2, 4), strict=True):
        assert rows == run["rows"][first:]
    assert run["digests"][0] == run["digests"][1]


def test_a_failure_in_the_background_is_told_to_all_ranks_and_leaves_the_older(background):
    first, second = background["failure"]
    assert first == second
    assert first.startswith("rank 1: writing") and "No space left on device" in first
    assert background["left"] == ["best", "latest", "step_2", "step_4"]
