"""`launch/benchmark.py ladder`: a known law comes back, what was not seen is predicted, the planner reads what was written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT

from data.cli import UserError
from data.dataset import PackedDataset
from data.terminal import drain
from launch.benchmarks import ladder
from launch.benchmarks.training_runs import rungs, trials
from launch.benchmarks.training_runs.scaling_law import bootstrap, fit
from launch.benchmarks.training_runs.shards import epochs
from launch.benchmarks.training_runs.small_runs import SmallRun, TrainingFailed
from launch.planning.ladder import Ladder, Law, active_parameters, in_words
from model import MoEGPTConfig

CHINCHILLA = Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
CPU = ROOT / "ds_configs/cpu_ep1_zero2.json"
SIZES, TOKENS = (1e6, 3e6, 1e7, 3e7), (2e7, 6e7, 2e8, 6e8)


def points(noise: float) -> list[tuple[float, float, float]]:
    random = np.random.default_rng(0)
    return [(n, d, CHINCHILLA.bits(n, d) * float(np.exp(noise * random.normal()))) for n in SIZES for d in TOKENS]


def test_a_known_law_comes_back() -> None:
    found = fit(points(0.0))
    assert asdict(found) == pytest.approx(asdict(CHINCHILLA), rel=1e-3)
    assert found.bits(1e9, 1e10) == pytest.approx(CHINCHILLA.bits(1e9, 1e10), rel=1e-5)


def test_the_truth_lies_in_the_interval_which_widens_with_distance() -> None:
    seen = points(0.003)
    law = fit(seen)
    largest = {"active": 3e7, "tokens": 6e8}
    made = Ladder(law=law, bootstrap=bootstrap(seen, law, draws=12), largest=largest, held_out_error=None, preferred=None)
    near, far = made.expectation(3e7, 6e8, 1.0, 64, 512), made.expectation(3e9, 6e10, 1.0, 64, 512)
    assert far["low"] < CHINCHILLA.bits(3e9, 6e10) < far["high"]
    assert far["high"] - far["low"] > 3 * (near["high"] - near["low"]) > 0
    assert far["beyond"] == pytest.approx({"parameters": 100, "tokens": 100})


@pytest.mark.slow
@pytest.mark.parametrize("side", [3, 4])
def test_the_truth_lies_in_the_interval_about_as_often_as_it_says(side: int) -> None:
    """Ten times the size and the tokens, noise of 0.3 %; of 20 intervals of 90 % fewer than 15 hold the truth once in 90 times."""
    law = CHINCHILLA if side == 4 else Law(A=60.0, B=80.0, E=0.6, alpha=0.3, beta=0.3)
    sizes, tokens = (SIZES, TOKENS) if side == 4 else ((1.8e5, 3.5e5, 6.1e5), (4e5, 8e5, 1.6e6))
    active, read = 10 * sizes[-1], 10 * tokens[-1]
    held, widths = 0, []
    for seed in range(20):
        random = np.random.default_rng(seed)
        seen = [(n, d, law.bits(n, d) * float(np.exp(0.003 * random.normal()))) for n in sizes for d in tokens]
        found = fit(seen)
        largest = {"active": sizes[-1], "tokens": tokens[-1]}
        laws = bootstrap(seen, found, draws=20)
        made = Ladder(law=found, bootstrap=laws, largest=largest, held_out_error=None, preferred=None)
        said = made.expectation(active, read, 1.0, 64, 512)
        held += said["low"] < law.bits(active, read) < said["high"]
        widths.append((said["high"] - said["low"]) / law.bits(active, read))
    assert held >= 15 and np.median(widths) < 0.4


@pytest.mark.parametrize(
    ("error", "floor", "doubts"), [(0.019, 0.5, 0), (0.0, 0.5, 0), (None, 0.5, 1), (0.037, 0.5, 1), (0.037, 1e-10, 2)]
)
def test_a_law_that_predicts_nothing_says_so(error: float | None, floor: float, doubts: int) -> None:
    law = replace(CHINCHILLA, E=floor)
    made = Ladder(law=law, bootstrap=[law], largest={"active": 1e8, "tokens": 1e8}, held_out_error=error, preferred=None)
    said = in_words(made.expectation(1e9, 1e9, 1.0, 64, 512), tokens=1e9)
    assert sum(line.startswith("not to be believed") for line in said) == doubts == len(said) - 1


def test_a_budget_far_beyond_the_runs_is_doubted() -> None:
    """Measured: 20 B tokens from runs of 3.2 M."""
    largest = {"active": 1e6, "tokens": 3.2e6}
    made = Ladder(law=CHINCHILLA, bootstrap=[CHINCHILLA], largest=largest, held_out_error=0.01, preferred=None)
    assert made.expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"] == []
    (tokens,) = made.expectation(1e8, 2e10, 1.0, 64, 512)["doubts"]
    assert tokens == "6,250 x the tokens of the largest run, over 100: no law is known to have held so far"
    assert len(made.expectation(4e8, 2e10, 1.0, 64, 512)["doubts"]) == 2
    assert [len(replace(made, epochs=n).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"]) for n in (4.0, 5.0)] == [0, 1]
    (vocabulary,) = replace(made, family={"vocabulary": 2048}).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"]
    assert vocabulary == "its runs' vocabulary has 2,048 tokens, this model's 512: D and N are counts of other things"
    assert replace(made, family={"vocabulary": 512}).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"] == []
    assert replace(made, fit_error=0.019).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"] == []
    (own,) = replace(made, fit_error=0.08).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"]
    assert "8.0% off on what it was fitted to, over 2%" in own
    (between,) = replace(made, held_out_step=1.0).expectation(1e8, 3.2e8, 1.0, 64, 512)["doubts"]
    assert "lies between" in between


def test_the_form_of_the_law_is_trusted_less_with_distance() -> None:
    """1 % on a size twice as large as the fitted ones: another 1 % for each doubling beyond."""
    largest = {"active": 1e6, "tokens": 1e6}
    made = Ladder(law=CHINCHILLA, bootstrap=[CHINCHILLA], largest=largest, held_out_error=0.01, preferred=None, held_out_step=2.0)
    for active, tokens, steps in ((1e6, 1e6, 1), (2e6, 1e6, 2), (8e6, 4e6, 6), (1e3, 4e6, 3)):
        said, middle = made.expectation(active, tokens, 1.0, 64, 512), CHINCHILLA.bits(active, tokens)
        assert (said["low"], said["high"]) == pytest.approx((middle / 1.01**steps, middle * 1.01**steps))
    without = replace(made, held_out_step=None).expectation(8e6, 4e6, 1.0, 64, 512)  # as older files have it
    assert without["high"] == pytest.approx(CHINCHILLA.bits(8e6, 4e6) * 1.01)


def test_a_large_model_learns_at_the_rate_of_a_member_of_the_family() -> None:
    best = {"learning_rate": 0.008, "batch_tokens": 4096.0, "flops": 1e12, "tokens": 1e6}
    family = {"width": 64, "widest": 160, "rate_exponent": 0.5, "learning_rate": 0.004, "batch_tokens": 4096, "head_dim": 32}
    largest = {"active": 1e6, "tokens": 1e6}
    made = Ladder(law=CHINCHILLA, bootstrap=[], largest=largest, held_out_error=0.0, preferred=best, family=family)
    said = made.expectation(1e7, 1e7, 1e15, 1536, 512)
    assert said["learning_rate"] == pytest.approx(rungs.rate_of(1536, 64, 0.008, 0.5)) == pytest.approx(0.008 / 24**0.5)
    assert said["batch_tokens"] == pytest.approx(4096 * 1000**0.3271)
    assert "0.008 at 4,096 tokens a step x (64 / 1536)^0.5, as the family up to width 160" in in_words(said, tokens=1e7)[-1]
    older = replace(made, family=None).expectation(1e7, 1e7, 1e15, 1536, 512)
    assert older["learning_rate"] is None and older["batch_tokens"] == said["batch_tokens"]
    assert "no learning rate (an older file" in in_words(older, tokens=1e7)[-1]


def test_the_interval_is_the_middle_of_the_bootstrapped_laws_and_holds_the_law() -> None:
    """A hundred and one laws, 0.01 bits apart: 5 % of them lie below 1.05 and above 1.95."""
    laws = [Law(A=0.0, B=0.0, E=1 + n / 100, alpha=0.3, beta=0.3) for n in range(101)]
    largest = {"active": 1e6, "tokens": 1e6}
    for middle, low, high in ((1.5, 1.05, 1.95), (0.9, 0.9, 1.95), (2.5, 1.05, 2.5)):
        law = replace(laws[0], E=middle)
        made = Ladder(law=law, bootstrap=laws[::-1], largest=largest, held_out_error=0.0, preferred=None)
        said = made.expectation(1e6, 1e6, 1.0, 64, 512)
        assert (said["bits_per_byte"], said["low"], said["high"]) == pytest.approx((middle, low, high))


@pytest.mark.parametrize(("exponent", "doubted"), [(-0.1, True), (0.0, True), (0.05, False), (1.0, False), (1.1, True)])
@pytest.mark.parametrize(("name", "what"), [("alpha", "parameters"), ("beta", "tokens")])
def test_an_exponent_beyond_sense_is_doubted(exponent: float, doubted: bool, name: str, what: str) -> None:
    law = replace(CHINCHILLA, **{name: exponent})
    made = Ladder(law=law, bootstrap=[law], largest={"active": 1e6, "tokens": 1e6}, held_out_error=0.0, preferred=None)
    found = made.doubts({"parameters": 1.0, "tokens": 1.0}, 512)
    assert [doubt.partition(" is ")[0] for doubt in found] == [f"the law's exponent of the {what}"] * doubted


def test_a_tied_head_multiplies_as_another_does() -> None:
    """N leaves out the embedding that multiplies nothing, and no head."""
    tied, untied = (MoEGPTConfig.preset("tiny", tie_word_embeddings=tied) for tied in (True, False))
    assert active_parameters(tied) == active_parameters(untied) > untied.vocab_size * untied.hidden_size


@pytest.mark.parametrize("name", ["ladder_failed", "ladder_rates"])
def test_files_of_before_are_read(name: str) -> None:
    made = Ladder.read(ROOT / f"tests/results/{name}.json")
    assert made.family is made.held_out_step is made.epochs is made.fit_error is None
    assert any("x the tokens of the largest run" in doubt for doubt in made.expectation(4e8, 2e10, 1e20, 1536, 512)["doubts"])


def test_a_run_that_learned_to_copy_is_off_its_own_law() -> None:
    """Measured: width 48 began to between 6.6 and 13.1 M tokens, 32 and 64 had not."""
    rows = {27_876: (2.2626, 2.1905, 2.1559), 65_337: (2.0521, 1.9503, 1.7452), 131_792: (1.9120, 1.7877, 1.7435)}
    points = {(n, d): (float(n), d, bits) for n, row in rows.items() for d, bits in zip((3.3e6, 6.6e6, 13.1e6), row, strict=True)}
    assert ladder.climb(points, held_out=None, draws=1)["fit_error"] > 0.05


def test_sizes_that_do_not_matter_make_no_prediction() -> None:
    """Measured: at 0.8 M tokens wider models are behind. The exponent of the size is then beyond sense, not beyond a float."""
    rows = {185e3: (2.308, 2.033, 1.850), 356e3: (2.367, 2.011, 1.815), 616e3: (2.390, 2.021, 1.811)}
    seen = [(n, d, loss) for n, row in rows.items() for d, loss in zip((8e5, 1.6e6, 3.2e6), row, strict=True)]
    law = fit(seen)
    laws = bootstrap(seen, law, draws=8)
    assert laws and all(np.isfinite(list(asdict(one).values())).all() for one in (law, *laws))
    largest = {"active": 1e6, "tokens": 3.2e6}
    found = Ladder(law=law, bootstrap=laws, largest=largest, held_out_error=0.01, preferred=None).expectation(
        4e8, 2e10, 1.0, 1536, 512
    )
    assert np.isfinite([found["low"], found["high"]]).all()
    assert any("exponent of the parameters" in doubt for doubt in found["doubts"])
    assert "2.500 to 1.34e+38 (" in in_words({**found, "low": 2.5, "high": 1.338465e38}, tokens=2e10)[0]
    assert replace(CHINCHILLA, A=1e300, alpha=-400.0).bits(1e9, 1e9) > 1e300


def test_too_few_losses_make_no_law() -> None:
    for sizes, tokens in ((SIZES[:2], TOKENS), (SIZES, TOKENS[:2])):
        with pytest.raises(ValueError, match="three sizes and three token counts"):
            fit([(n, d, CHINCHILLA.bits(n, d)) for n in sizes for d in tokens])


def test_the_family_has_the_shape_of_800m() -> None:
    large = rungs.family(1536, 49_152, 2048, head_dim=64).to_dict()
    differs = {name for name, value in MoEGPTConfig.preset("800m").to_dict().items() if large[name] != value}
    assert differs <= {"rope_parameters", "router_bias_rate"}
    assert [rungs.family(h, 512, 64, head_dim=64).num_key_value_heads for h in (64, 128, 192, 256, 384)] == [1, 1, 1, 1, 2]
    with pytest.raises(UserError, match="--hidden 100 must be a multiple of 32"):
        rungs.family(100, 512, 64, head_dim=32)
    with pytest.raises(UserError, match="--head_dim 15 must be even"):
        rungs.family(60, 512, 64, head_dim=15)


def test_the_smallest_member_has_two_layers() -> None:
    smallest = parse("--data", "x")
    assert rungs.family(min(smallest.hidden), 512, 64, head_dim=smallest.head_dim).num_hidden_layers == 2


VOCABULARY = 512


def parse(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ladder.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def test_a_ladder_of_a_known_law(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training replaced by the law, with a learning rate and a batch that it likes best: all else as the command does it."""
    truth, trained = Law(A=60.0, B=80.0, E=0.6, alpha=0.3, beta=0.3), []

    def result(one: SmallRun) -> dict[str, Any]:
        tokens = one.steps * one.deepspeed["train_batch_size"] * one.sequence_length
        rate = one.deepspeed["optimizer"]["params"]["lr"]
        return {"bits": [9.0, truth.bits(one.active, tokens) + 0.01 * abs(np.log(rate / 0.004))]}

    monkeypatch.setattr(SmallRun, "train", lambda one, stop_after: trained.append((one.folder, stop_after)))
    monkeypatch.setattr(SmallRun, "result", result)
    flags = ["--data", f"{small_shards}:0.5", "--hidden", 64, 128, 192, 256, "--tokens", 409600, 819200, 1638400]
    flags += ["--deepspeed_config", CPU, "--learning_rates", 0.002, 0.004, 0.008, "--tune_hidden", 128]  # the first is the JSON's
    found = ladder.run(parse(*flags, "--draws", 5, "--folder", tmp_path / "runs", "--chart", tmp_path / "l.svg"))
    lines = [node for node in ET.parse(tmp_path / "l.svg").iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2 * (4 + 3) and sum("stroke-dasharray" in line.attrib for line in lines) == 4 + 3
    assert len({folder for folder, _ in trained}) == 4 * 3 + 2 * 2
    assert (
        found["held_out"] == 256 and found["fit_error"] < 0.002 and found["held_out_error"] < 0.002 and found["held_out_step"] > 1.5
    )
    assert found["preferred"]["learning_rate"] == 0.004 and found["preferred"]["tokens"] == 1638400
    assert found["family"]["learning_rate"] == 0.002 and found["family"]["rate_exponent"] == 0
    assert found["family"]["vocabulary"] == 512
    drain()
    said, shown = capsys.readouterr(), "width 64 prefers learning rate 0.004 and 4,096 tokens a step, the law is of 0.002"
    assert (
        "16 runs, " in said.err
        and "12 of the family, 4 more to try rates and batches on width 64 128 for 1.64 M tokens" in said.err
    )
    assert f"read the data {found['epochs']:.3g} times" in said.err and found["epochs"] > 1
    by_width = "best learning rates by width: 0.004 for 64, 0.004 for 128; that is (smallest / width)^0.00, the family's is ^0"
    assert by_width in said.out and len(found["trials"]) == 6
    assert shown in said.out and "not to be believed" in said.out
    (tmp_path / "l.json").write_text(json.dumps(found))
    check_the_plan(tmp_path / "l.json")


def test_the_law_goes_through_the_means_of_the_seeds(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each seed is off by 5 %, to either side; the first one's runs lie where a ladder of one seed has them."""
    truth, off = Law(A=60.0, B=80.0, E=0.6, alpha=0.3, beta=0.3), {1234: 0.95, 7: 1.05}
    monkeypatch.setattr(SmallRun, "train", lambda one, stop_after: None)
    monkeypatch.setattr(SmallRun, "result", lambda one: {"bits": [9.0, truth.bits(one.active, one.tokens) * off[one.seed]]})
    flags = ["--data", small_shards, "--hidden", 64, 128, 192, 256, "--tokens", 409600, 819200, 1638400, "--draws", 2]
    flags += ["--deepspeed_config", CPU, "--folder", tmp_path / "runs", "--held_out_tokens", 409600]
    one_seed, both = parse(*flags), parse(*flags, "--seeds", 1234, 7, "--chart", tmp_path / "l.svg")
    first = rungs.plan_runs(one_seed, VOCABULARY)
    assert rungs.plan_runs(both, VOCABULARY) == first
    runs = rungs.with_seeds(first, both.seeds)
    assert all(one == first[key] and other.seed == 7 and other.folder != one.folder for key, (one, other) in runs.items())
    found = ladder.run(both)
    assert found["fit_error"] < 0.002 and found["held_out_error"] < 0.002 and len(found["points"]) == 10
    assert all(p["of_seeds"] == pytest.approx([p["bits"] * 0.95, p["bits"] * 1.05]) for p in found["points"])
    drain()
    said = capsys.readouterr()
    assert "20 runs, " in said.err and "least  greatest" in said.out
    assert ladder.run(one_seed)["fit_error"] < 0.002
    assert "greatest" not in capsys.readouterr().out


def test_a_width_trains_at_its_own_rate_beside_the_runs_at_one_rate(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--hidden", 64, 128, 256, "--tokens", 409600, 819200, "--folder", tmp_path]
    flags += ["--deepspeed_config", CPU]  # at 0.002
    same, scaled = rungs.plan_runs(parse(*flags), VOCABULARY), rungs.plan_runs(parse(*flags, "--rate_exponent", 1), VOCABULARY)
    rates = {hidden: one.deepspeed["optimizer"]["params"]["lr"] for (hidden, _), one in scaled.items()}
    assert rates == {64: 0.002, 128: 0.001, 256: 0.0005}
    narrower = [*flags[:2], "--hidden", 128, 256, 512, *flags[6:], "--rate_exponent", 1, "--rate_hidden", 64]
    others = rungs.plan_runs(parse(*narrower), VOCABULARY)
    assert all(
        others[rung].folder == scaled[rung].folder and others[rung].deepspeed == scaled[rung].deepspeed
        for rung in others.keys() & scaled.keys()
    )
    assert len(others.keys() & scaled.keys()) == 4
    assert {one.deepspeed["optimizer"]["params"]["lr"] for one in same.values()} == {0.002}
    assert len({one.folder for one in (*same.values(), *scaled.values())}) == 12
    without = tmp_path / "without.json"
    without.write_text(json.dumps({"train_batch_size": 16, "optimizer": {"type": "AdamW", "params": {}}}))
    for flag, value in (("--rate_exponent", 1), ("--learning_rates", 0.1), ("--batches", 4)):
        with pytest.raises(UserError, match=rf"{flag} needs optimizer\.params\.lr"):
            rungs.plan_runs(parse(*flags[:-1], without, flag, value), VOCABULARY)


def test_the_held_out_width_is_trained_for_some_of_the_tokens(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--hidden", 64, 128, 192, 256, "--tokens", 409600, 819200, 1638400, "--folder", tmp_path]
    flags += ["--deepspeed_config", CPU, "--held_out_tokens", 409600, 819200, "--learning_rates", 0.001, "--tune_hidden", 256]
    largest = parse(*flags)
    planned = rungs.plan_runs(largest, VOCABULARY)
    assert {key for key in planned if key[0] == 256} == {(256, 409600), (256, 819200)} and len(planned) == 11
    smallest = parse(*flags, "--held_out", 64)
    planned = rungs.plan_runs(smallest, VOCABULARY)
    assert {key for key in planned if key[0] == 64} == {(64, 409600), (64, 819200)} and len(planned) == 11
    assert rungs.family_facts(smallest, planned)["width"] == 64
    assert {one.config.hidden_size for one in trials.plan_trials(smallest, planned).values()} == {64, 256}


def test_rate_and_batch_are_tried_on_the_longest_run_of_the_smallest_width(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--hidden", 64, 128, 192, "--tokens", 409600, 1638400, "--folder", tmp_path]
    flags += ["--deepspeed_config", CPU, "--batches", 16, 32, "--learning_rates", 0.001, 0.002]
    for more, tokens in (([], 1638400), (["--tune_tokens", 409600], 409600), (["--tune_tokens", 819200], 819200)):
        arguments = parse(*flags, *more)
        tried = trials.plan_trials(arguments, rungs.plan_runs(arguments, VOCABULARY)).values()
        assert {one.config.hidden_size for one in tried} == {64}
        assert {one.tokens for one in tried} == {tokens}
        own = [one for one in tried if one.folder.parent.name == "hidden_64"]
        assert len(own) == (tokens != 819200) and len({one.folder for one in tried}) == 4


def test_rates_are_tried_on_other_widths_by_the_rule_of_the_family(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--hidden", 64, 128, 192, "--tokens", 409600, 1638400, "--folder", tmp_path]
    flags += ["--deepspeed_config", CPU, "--batches", 32, "--learning_rates", 0.001, 0.002, "--tune_hidden", 192]
    for exponent in (0.0, 1.0):
        arguments = parse(*flags, "--rate_exponent", exponent)
        planned = trials.plan_trials(arguments, rungs.plan_runs(arguments, VOCABULARY))
        assert set(planned) == {
            (64, 0.001, 16),
            (64, 0.001, 32),
            (64, 0.002, 16),
            (64, 0.002, 32),
            (192, 0.001, 16),
            (192, 0.002, 16),
        }
        for (hidden, rate, batch), one in planned.items():
            assert one.deepspeed["optimizer"]["params"]["lr"] == rungs.rate_of(hidden, 64, rate, exponent)
            assert (one.config.hidden_size, one.batch, one.tokens) == (hidden, batch, 1638400)
        assert len({one.folder for one in planned.values()}) == 6
        assert {one.folder.parent.name for one in planned.values()} == {"hidden_64", "hidden_192", "tuning"}  # 0.002 is the JSON's


def tried(hidden: int, rate: float, bits: float, batch: float = 4096.0) -> dict[str, Any]:
    return {"hidden": hidden, "learning_rate": rate, "batch_tokens": batch, "tokens": 1e6, "flops": 1e12, "bits": bits}


def test_the_exponent_of_the_best_rates_is_that_of_known_curves() -> None:
    """Parabolas over log(rate) whose lowest points go by width^-0.8 and lie between the rates that were tried."""
    best = {hidden: 0.011 * (32 / hidden) ** 0.8 for hidden in (32, 64, 128)}
    made = [
        tried(hidden, rate, 2.0 + 0.1 * float(np.log(rate / lowest)) ** 2)
        for hidden, lowest in best.items()
        for rate in (lowest / 3, lowest / 1.3, lowest * 1.7)
    ]
    made.append(tried(32, 0.5, 1.0, batch=8192.0))  # a batch that the others did not try
    found = trials.best_rates(made)
    assert found == pytest.approx(best)
    assert trials.fitted_exponent(found) == pytest.approx(0.8)
    assert trials.fitted_exponent({64: 0.01}) is None


def test_the_lowest_point_of_what_was_tried() -> None:
    assert trials.lowest({0.001: 3.0, 0.002: 2.0, 0.004: float("nan")}) == 0.002  # beside one that diverged
    assert trials.lowest({0.001: 1.0, 0.002: 2.0, 0.004: 3.0}) == 0.001
    assert trials.lowest({0.001: float("inf")}) is None
    between = trials.lowest({0.001: 2.3, 0.002: 2.0, 0.004: 2.1})
    assert between is not None and 0.002 < between < 0.004


def test_a_best_value_at_the_edge_of_what_was_tried_is_said() -> None:
    made = [tried(64, 0.001, 2.0), tried(64, 0.002, 2.1), tried(64, 0.001, 2.2, batch=8192.0), tried(64, 0.002, 2.3, batch=8192.0)]
    rate, batch = trials.at_the_edge(made)
    assert rate == "width 64: the best learning rate, 0.001, is the least that was tried: try beyond it"
    assert batch == "width 64: the best batch in tokens, 4096, is the least that was tried: try beyond it"
    assert trials.at_the_edge([tried(64, 0.001, 2.1), tried(64, 0.002, 2.0), tried(64, 0.004, float("nan"))]) == []
    assert trials.at_the_edge([tried(64, 0.001, float("nan")), tried(64, 0.002, float("nan"))]) == []


def test_what_training_would_refuse_is_refused_before_the_first(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--folder", tmp_path, "--deepspeed_config", CPU]
    with pytest.raises(UserError, match="some are the same number of steps of 4,096 tokens"):
        rungs.plan_runs(parse(*flags, "--tokens", 40000, 40001, 80000), VOCABULARY)
    with pytest.raises(UserError, match="train_batch_size 15 is no multiple of 2"):
        ladder.run(parse(*flags, "--ranks", 2, "--batches", 15))
    with pytest.raises(UserError, match="--rate_exponent -1000 gives width 96 a learning rate of 2"):
        ladder.run(parse(*flags, "--rate_exponent", -1000))


def test_a_run_that_diverged_makes_no_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parse("--data", "x", "--folder", tmp_path, "--deepspeed_config", CPU, "--learning_rates", 0.002, 9)
    planned = rungs.plan_runs(arguments, VOCABULARY)
    made = trials.plan_trials(arguments, planned)
    (first, lost), *others = made.items()
    bits = {one.folder: [9.0, 2.0] for one in planned.values()} | {one.folder: [9.0, 2.0] for _, one in others}
    bits[lost.folder] = [9.0, float("nan")]
    monkeypatch.setattr(SmallRun, "result", lambda one: {"bits": bits[one.folder]})
    with pytest.raises(UserError, match="hidden_64 tokens_1600000 diverged, and no law goes through that"):
        for one in planned.values():
            ladder.bits_of(one)
    assert trials.judged(made, {})["preferred"]["learning_rate"] == 9
    alone = trials.judged({first: lost}, {})
    assert alone["preferred"] is None and alone["best_rates"] == {}
    assert trials.in_words(alone, {}) == [
        "no rate or batch that was tried ended with a finite loss: where they diverged, try lower rates"
    ]


def test_a_trial_that_ended_over_skipped_steps_was_tried(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that diverges ends its training mostly, and has no result: nobody is sent there."""

    def train(one: SmallRun, stop_after: int) -> None:
        if one.deepspeed["optimizer"]["params"]["lr"] == 9:
            raise TrainingFailed(f"{one.name}: 5 steps in a row were skipped")

    def worse(one: SmallRun) -> float:
        return 0.1 if one.deepspeed["optimizer"]["params"]["lr"] == 0.001 else 0.0

    truth = Law(A=60.0, B=80.0, E=0.6, alpha=0.3, beta=0.3)
    monkeypatch.setattr(SmallRun, "train", train)
    monkeypatch.setattr(SmallRun, "result", lambda one: {"bits": [9.0, truth.bits(one.active, one.tokens) + worse(one)]})
    flags = ["--data", small_shards, "--hidden", 64, 96, 128, "--held_out", "none", "--tokens", 409600, 819200, 1638400]
    flags += ["--deepspeed_config", CPU, "--learning_rates", 0.001, 0.002, 9, "--draws", 2, "--folder", tmp_path / "runs"]
    found = ladder.run(parse(*flags))
    (reason,) = found["failed"].values()
    assert {one["learning_rate"]: one["failed"] for one in found["trials"]} == {0.001: None, 0.002: None, 9: reason}
    assert found["preferred"]["learning_rate"] == 0.002 and np.isnan(found["trials"][2]["bits"])
    assert "try beyond it" not in capsys.readouterr().out


def test_how_often_the_data_are_read(small_shards: Path) -> None:
    alone = PackedDataset([small_shards], split="train", sequence_length=64)
    blend = PackedDataset([(small_shards, 3.0), (small_shards, 1.0)], split="train", sequence_length=64)
    assert epochs(alone, 2.5 * alone.tokens) == pytest.approx(2.5)
    assert epochs(blend, 2 * alone.tokens) == pytest.approx(1.5)


def check_the_plan(path: Path) -> None:
    """`launch/plan.py --ladder` says what the file says."""
    command = [sys.executable, "launch/plan.py", "--model", "800m", "--gpu", "h100-80gb", "--tokens", "2e10", "--ladder", str(path)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    said, read = json.loads(done.stdout)["expected"], Ladder.read(path)
    active = active_parameters(MoEGPTConfig.preset("800m"))
    assert said["active"] == active and said["bits_per_byte"] == pytest.approx(read.law.bits(active, 2e10))
    assert said["low"] < said["bits_per_byte"] < said["high"]
    assert read.preferred is not None and said["learning_rate"] == read.preferred["learning_rate"]  # one rate for all widths
    assert said["batch_tokens"] > read.preferred["batch_tokens"]
    words = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{said['bits_per_byte']:.3f} bits per byte, {said['low']:.3f} to {said['high']:.3f}" in words
    without = subprocess.run(command[:6] + command[8:], cwd=ROOT, capture_output=True, text=True, check=False)
    assert without.returncode == 2 and "--ladder needs --tokens" in without.stderr


def test_what_cannot_be_a_ladder_is_said(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("{}")
    with pytest.raises(UserError, match="is not what launch/benchmark"):
        Ladder.read(tmp_path / "l.json")
    with pytest.raises(UserError, match="is not a file"):
        Ladder.read(tmp_path / "none.json")
    whole = json.loads((ROOT / "tests/results/ladder_rates.json").read_text())
    for name, value in (("largest", 5), ("law", {**whole["law"], "A": "x"}), ("held_out_error", "x"), ("preferred", {"flops": 0})):
        (tmp_path / "l.json").write_text(json.dumps({**whole, name: value}))
        with pytest.raises(UserError, match=r"is not what launch/benchmark\.py ladder --output writes"):
            Ladder.read(tmp_path / "l.json")
    wrong: dict[str, list[object]] = {
        "three token counts at least, beside width 128, which is held out": ["--hidden", 32, 64, 128],
        r"three token counts at least: got --hidden 64 128 and": ["--hidden", 64, 128, "--held_out", "none"],
        r"and --tokens 400000$": ["--tokens", 4e5],
        "--held_out 192 must be one of --hidden 64 128, or largest, or none": ["--hidden", 64, 128, "--held_out", 192],
        "--tokens must be over 0, got -1": ["--tokens", -1, 4e5, 8e5],
        "--draws must be at least 1": ["--draws", 0],
        "--target_tokens must be over 0, got nan": ["--target_tokens", "nan"],
        "--learning_rates must be over 0": ["--learning_rates", 0],
        "--seeds 7 7: give each seed once": ["--seeds", 7, 7],
        "--rate_hidden 64 must be a width, and goes with": ["--rate_hidden", 64],
        "--held_out_tokens 5 must be some of --tokens": ["--held_out_tokens", 5],
        "must be some of --tokens, and goes with a width": ["--held_out", "none", "--held_out_tokens", 409600],
        "--tune_tokens is of what --learning_rates": ["--tune_tokens", 5],
        "--tune_hidden is of what --learning_rates": ["--tune_hidden", 96],
        "--tune_hidden 100 must be one of --hidden 64 96 128 160": ["--tune_hidden", 100, "--learning_rates", 1e-3],
    }
    for sentence, flags in wrong.items():
        with pytest.raises(UserError, match=sentence):
            rungs.check(parse("--data", "x", *flags))


def test_the_largest_width_is_held_out_unless_said_otherwise() -> None:
    assert rungs.held_out_width(parse("--data", "x")) == 160
    assert rungs.held_out_width(parse("--data", "x", "--held_out", 96)) == 96
    assert rungs.held_out_width(parse("--data", "x", "--held_out", "none")) is None
    assert [ladder.step_outward({2.0, 4.0, 6.0}, size) for size in (12.0, 1.0, 5.0)] == [2.0, 2.0, 1.0]


@pytest.mark.slow
def test_a_real_ladder_of_seconds(small_shards: Path, tmp_path: Path) -> None:
    """Nine runs of a few steps: too short for a law that says anything, long enough for every part to have run."""
    command = [sys.executable, "launch/benchmark.py", "ladder", "--data", small_shards, "--output", tmp_path / "l.json"]
    command += [
        "--hidden",
        32,
        64,
        96,
        "--held_out",
        "none",
        "--tokens",
        4096,
        8192,
        16384,
        "--sequence_length",
        64,
        "--eval_batches",
        1,
    ]
    command += ["--draws", 5, "--folder", tmp_path / "runs"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["points"]) == 9 and Ladder.read(tmp_path / "l.json").largest["tokens"] == 16384
    by_size = [point["bits"] for point in found["points"] if point["hidden"] == 96]
    assert by_size == sorted(by_size, reverse=True)
