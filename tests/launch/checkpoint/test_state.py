"""`state.json`: what was saved comes back, and what makes no sense is refused although its checksum is right."""

import json
from dataclasses import replace

import pytest
from stub_engine import manager, replace_file, state

from launch.checkpoint.state import STATE, read_state
from launch.manifest import to_json

NONSENSE = [
    ({"step": "3; x"}, 'step must be a whole number from 0 up, not "3; x"'),
    ({"step": 2}, "step is 2 in a folder named step_3"),
    ({"step": True}, "step must be a whole number"),
    ({"samples": -16}, "samples must be a whole number from 0 up, not -16"),
    ({"tokens": 1.5}, "tokens must be a whole number"),
    ({"best_loss": "low"}, "best_loss must be a number or null"),
    ({"samples": 2**53}, "samples must be a whole number from 0 up, not 9007199254740992"),
    ({"best_loss": 10**400}, "best_loss must be a number or null"),
    ({"best_step": 4}, "best_step must be a step up to 3 or null, not 4"),
    ({"best_step": -1}, "best_step must be a step up to 3 or null, not -1"),
    ({"best_step": "3"}, 'best_step must be a step up to 3 or null, not "3"'),
    ({"optimizer": {"lr": 10**400, "state": []}}, "optimizer.lr must be a finite number"),
    ({"extra": [1]}, "extra must be an object"),
    ({"counted": 1}, "counted must be true or false, not 1"),
    ({"identity": None}, "identity must be an object, not null"),
    ({"identity": {"model": [8]}}, "identity.model must be an object, not [8]"),
    ({"optimizer": {"lr": float("nan"), "state": []}}, "optimizer.lr must be a finite number"),
    ({"optimizer": {"lr": 0.1, "state": "exp_avg"}}, "optimizer.state must be a list of names"),
    ({"optimizer": {"lr": 0.1, "state": [], "parameters": [1]}}, "optimizer.parameters must be a list of names"),
    ({"optimizer": {}}, "optimizer.lr must be a finite number, not null"),
]


@pytest.mark.parametrize(("change", "sentence"), NONSENSE, ids=[sentence for _, sentence in NONSENSE])
def test_nonsense_with_right_sums_is_refused_never_passed_over(run, change, sentence):
    folder = run / "checkpoints/step_3"
    replace_file(folder, STATE, to_json({**json.loads((folder / STATE).read_bytes()), **change}))
    with pytest.raises(ValueError, match=r"step_3/state\.json") as caught:
        manager(run).choose("auto")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("samples", "sense"), [(23, False), (24, True), (40, True)])
def test_a_place_in_the_data_is_not_before_the_steps_taken(run, samples, sense):
    """Of three steps of eight samples. More are of steps that a rollback took back, and such a run goes on as well."""
    folder = run / "checkpoints/step_3"
    body = json.loads((folder / STATE).read_bytes())
    replace_file(folder, STATE, to_json({**body, "samples": samples, "identity": {**body["identity"], "global_batch": 8}}))
    if sense:
        assert manager(run, global_batch=8).choose("auto").state.samples == samples
        return
    with pytest.raises(ValueError, match=r"samples is 23 at step 3 of 8 samples each"):
        manager(run, global_batch=8).choose("auto")


@pytest.mark.parametrize("text", [b"[]", b"not JSON", b"", b"[" * 100_000])
def test_what_is_no_object_is_refused(run, text):
    replace_file(run / "checkpoints/step_3", STATE, text)
    with pytest.raises(ValueError, match=r"step_3/state\.json"):
        manager(run).choose("auto")


def test_a_best_loss_that_an_older_version_saved_as_nan_counts_as_none(run):
    folder = run / "checkpoints/step_3"
    assert read_state(folder).training == state(3)
    body = json.loads((folder / STATE).read_bytes())
    replace_file(folder, STATE, to_json({**body, "best_loss": float("nan"), "best_step": 2}))
    assert read_state(folder).training == state(3)


def test_whose_the_best_loss_is_comes_back_and_of_an_older_version_is_not_known(run):
    folder = run / "checkpoints/step_3"
    body = {**json.loads((folder / STATE).read_bytes()), "best_loss": 2.5, "best_step": 3}
    replace_file(folder, STATE, to_json(body))
    assert read_state(folder).training == replace(state(3), best_loss=2.5, best_step=3)
    del body["best_step"]
    replace_file(folder, STATE, to_json(body))
    assert read_state(folder).training == replace(state(3), best_loss=2.5)
    del body["best_loss"], body["counted"]
    replace_file(folder, STATE, to_json(body))
    assert read_state(folder).training == state(3) and read_state(folder).counted
