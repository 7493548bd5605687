"""Parallel equals serial: every layout on 1, 2 and 4 ranks against plain PyTorch in one process, fp32, SGD.

With SGD, because Adam cannot see a constant factor on a gradient. Compared after several steps: loss and global gradient norm
of each step, the weights, what training changed in them (weights alone hide a gradient that is a little wrong), the biases.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nursery import Nursery
from parity_problem import ROUTINGS, train_plainly

TOLERANCE = 1e-6
#: Of the change alone, whose rounding is that of the weights, 2**-24 * |weights| / |change|: norms' weights stay near 1.
CHANGE_TOLERANCE = 1e-4
WORKER = "tests/distributed/parity_worker.py"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The file with the weights, and the rows, by kind of routing and clipping."""
    weights, rows = {}, {}
    for routing in ROUTINGS:
        for clip in (False, True):
            name = f"{routing}, clip {clip}"
            weights[name], rows[name] = train_plainly(routing, clip)
    path = tmp_path_factory.mktemp("parity") / "reference.pt"
    torch.save(weights, path)
    return path, rows


SOME = [pytest.param((ranks, "some"), id=f"{ranks}-ranks") for ranks in (1, 2, 4)]
EVERY = [pytest.param((ranks, "every"), id=f"{ranks}-ranks-every", marks=pytest.mark.slow) for ranks in (1, 2, 4)]


@pytest.fixture(scope="module", params=SOME + EVERY)
def results(request: pytest.FixtureRequest, nursery: Nursery, reference: tuple[Path, dict]) -> list[dict]:
    (ranks, which), folder = request.param, reference[0].parent
    output = folder / f"{ranks}_{which}.json"
    running = nursery.start(ranks, WORKER, reference[0], output, which, log=folder / f"{ranks}_{which}.log")
    assert running.wait(300 if which == "some" else 3000) == [0] * ranks, running.text()[-4000:]
    return json.loads(output.read_text())


def name(case: dict) -> str:
    keys = ("ranks", "ep", "zero", "accumulation", "checkpointing", "clip", "routing")
    return ", ".join(f"{key} {case[key]}" for key in keys)


def rows_of(case: dict, reference: tuple[Path, dict]) -> dict:
    return reference[1][f"{case['routing']}, clip {case['clip']}"]


def test_every_layout_runs(results: list[dict]) -> None:
    broken = {name(case): case["error"][-800:] for case in results if "error" in case}
    assert not broken, json.dumps(broken, indent=1).replace("\\n", "\n")
    assert max(case["ep"] for case in results) == results[0]["ranks"]


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_losses_and_gradient_norms(results: list[dict], reference: tuple[Path, dict], what: str) -> None:
    wrong = {}
    for case in results:
        wanted = rows_of(case, reference)[what]
        error = np.max([abs(a - b) / b for a, b in zip(case[what], wanted, strict=True)])  # Python's passes over a NaN
        if not error <= TOLERANCE:
            wrong[name(case)] = (error, case[what], wanted)
    assert not wrong, json.dumps(wrong, indent=1)


def test_weights(results: list[dict]) -> None:
    wrong = {
        name(case): (case["weights"], case["changes"], case["worst"])
        for case in results
        if not (case["weights"] <= TOLERANCE and case["changes"] <= CHANGE_TOLERANCE)
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_biases_and_loads_are_the_same(results: list[dict], reference: tuple[Path, dict]) -> None:
    for case in results:
        wanted = rows_of(case, reference)
        if case["routing"] == "by quantiles":  # of scores that are equal to rounding, so a token may fall into the next bin
            assert case["bias"] == [pytest.approx(bias, abs=1e-3) for bias in wanted["bias"]], name(case)
            assert case["lifts"] == wanted["lifts"] and min(map(min, case["lifts"])) == max(map(max, case["lifts"])) > 0, name(case)
        else:
            assert case["bias"] == wanted["bias"], name(case)
        assert case["imbalance"] == wanted["imbalance"], name(case)


def test_the_cases_are_what_they_say(results: list[dict], reference: tuple[Path, dict]) -> None:
    from parity_problem import CLIP, EXPERTS

    for case in results:
        imbalance = rows_of(case, reference)["imbalance"]
        if case["routing"] == "one expert":
            assert all(layer == EXPERTS for step in imbalance for layer in step)
            assert case["ep"] == 1 or max(case["fewest"]) == 0  # ranks without a token for their experts
        else:
            assert all(1.2 < layer < EXPERTS for step in imbalance for layer in step)
        if case["clip"]:
            assert min(case["norm"]) > 2 * CLIP


@pytest.mark.parametrize("where", range(3))
def test_a_nan_is_no_small_error(where: int) -> None:
    """Wherever it comes: first, where Python's own maximum keeps it, and later."""
    from parity_worker import distance

    sound = [torch.tensor([1.0, 2.0])] * 3
    after = [*sound[:where], torch.full((2,), torch.nan), *sound[where + 1 :]]
    before, names = [torch.zeros(2)] * 3, "abc"
    found = distance(*(dict(zip(names, values, strict=True)) for values in (before, after, sound)))
    assert found["worst"] == names[where]
    layout = dict.fromkeys(("ranks", "ep", "zero", "accumulation", "checkpointing", "clip"), 0)
    case = {**layout, "routing": "", **found, "loss": [math.nan if i == where else 4.0 for i in range(3)]}
    with pytest.raises(AssertionError, match="NaN"):
        test_weights([case])
    with pytest.raises(AssertionError, match="NaN"):
        test_losses_and_gradient_norms([case], (Path(), {", clip 0": {"loss": [4.0] * 3}}), "loss")
