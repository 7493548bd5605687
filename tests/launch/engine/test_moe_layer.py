"""Our MoE layer equals stock AutoEP's in fp32, outputs and gradients, on two ranks with EP 1 and EP 2."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from nursery import Nursery

from launch.engine.moe_layer import MoELayer

#: Relative, of outputs and gradients: both sum the same products, in fp32, in another order.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def ranks(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("moe_layer")
    running = nursery.start(2, "tests/launch/engine/moe_layer_worker.py", folder / "out.json", log=folder / "log")
    assert running.wait(180) == [0, 0], running.text()[-4000:]
    results = json.loads((folder / "out.json").read_text())
    for result in results:
        assert "error" not in result, result["error"]
    return results


def test_outputs_and_gradients_equal_stock_autoep(ranks: list[dict]) -> None:
    wrong = {}
    for result in ranks:
        assert {(case["experts"], case["ep"]) for case in result["cases"]} == {(8, 1), (8, 2), (2, 1), (2, 2)}
        for case in result["cases"]:
            bad = {name: value for name, value in case["difference"].items() if not value <= TOLERANCE}
            if bad:
                wrong[f"experts {case['experts']}, ep {case['ep']}, {case['routing']}"] = bad
    assert not wrong, json.dumps(wrong, indent=1)


def test_saving_less_changes_no_bit(ranks: list[dict]) -> None:
    assert all(case["rebuilt_equal"] for result in ranks for case in result["cases"])


def test_the_cases_are_what_they_say(ranks: list[dict]) -> None:
    """Every gradient is there where rows went; experts were empty; a rank got no row."""
    for result in ranks:
        for case in result["cases"]:
            load = case["load"]
            assert sum(load) == 96 * case["top_k"]
            if case["routing"] == "spread":
                assert all(load) and all(norm > 1e-3 for norm in case["norms"].values()), case
            if case["routing"] == "one expert":
                assert load[-1] == 96
            if case["routing"] == "empty":
                assert not any(load[: case["experts"] // 2])
    lonely = [case for case in ranks[0]["cases"] if case["ep"] == 2 and case["routing"] == "empty"]
    assert lonely and all(case["norms"]["experts.w1"] == 0 == case["norms"]["experts.w2"] for case in lonely)


@pytest.mark.parametrize("what", ["dropout_equals_plain", "dropped", "replayed", "would_differ"])
def test_dropout_and_replay(ranks: list[dict], what: str) -> None:
    assert all(result[what] for result in ranks)


def test_what_the_layer_does_not_do_is_refused(ranks: list[dict]) -> None:
    """It would weigh the rows after the experts all the same."""
    assert all("score_apply 'post'); got comm_backend 'comm' and score_apply 'pre'" in result["refusal"] for result in ranks)


@pytest.mark.parametrize(
    ("backend", "applied", "logits", "fits"),
    [("comm", "post", False, True), ("deepep", "post", False, False), ("comm", "pre", False, False), ("comm", "post", True, False)],
)
def test_a_layer_that_would_do_otherwise_is_not_made(
    backend: str, applied: str, logits: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no JSON was looked at."""
    made = {"comm_backend": backend, "score_apply": applied, "return_router_logits": logits}
    monkeypatch.setattr(AutoEPMoELayer, "__init__", lambda self: vars(self).update(made))
    with nullcontext() if fits else pytest.raises(ValueError, match="this model's layer exchanges by"):
        MoELayer()


def test_a_layer_without_its_shared_experts_is_refused(ranks: list[dict]) -> None:
    assert all(result["without_shared"] == "layer 0: AutoEP left out the shared experts" for result in ranks)
