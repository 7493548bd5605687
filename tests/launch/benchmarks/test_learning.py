"""`launch/benchmark.py learning`: what it compares is alike but for the variant, what it reads out of a run is what lies there."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT
from transformers import Glm4MoeForCausalLM

from data.cli import UserError
from data.files import finite
from data.terminal import drain
from launch.benchmarks import learning
from launch.benchmarks.svg_curves import Curve, draw
from launch.benchmarks.training_runs import small_runs
from launch.benchmarks.training_runs.shards import Shards
from launch.benchmarks.training_runs.variants import built_in, chosen_variants, merged, read_variants
from launch.engine.keys import check_keys
from launch.engine.strategy import read_config, resolve_config
from launch.reporting.read import read_run
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.accounting import forward_flops_per_token
from model.glm4_moe import to_glm4_moe

CONFIG = "ds_configs/cpu_ep1_zero2.json"


def parse(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    learning.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def test_a_variant_changes_what_it_names() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": 5}, "d": None, "e": {"f": 6}}) == {"a": {"b": 5, "c": 2}, "e": {"f": 6}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    config = MoEGPTConfig.preset("tiny")
    for name, variant in built_in(config).items():
        made = variant.config(config).to_dict()
        changed = {field for field, value in config.to_dict().items() if made[field] != value}
        assert changed <= set(variant.model), name


def test_the_dense_twin_has_the_flops_of_a_token() -> None:
    config = MoEGPTConfig.preset("tiny")
    dense = built_in(config)["dense"].config(config)
    assert dense.n_routed_experts == dense.num_experts_per_tok == config.num_experts_per_tok
    router = 2 * config.num_hidden_layers * config.hidden_size * (config.n_routed_experts - dense.n_routed_experts)
    assert forward_flops_per_token(config, 256) - forward_flops_per_token(dense, 256) == router


def test_the_plain_twin_is_one_swiglu_as_wide_as_what_a_token_uses() -> None:
    base = MoEGPTConfig.preset("tiny", vocab_size=64, num_hidden_layers=1, routed_scaling_factor=2.0)
    config = built_in(base)["dense_plain"].config(base)
    router = 2 * base.hidden_size * (base.n_routed_experts - 1)
    assert forward_flops_per_token(base, 256) - forward_flops_per_token(config, 256) == router
    layer = MoEGPTForCausalLM(config).double().model.layers[0].mlp
    x = torch.randn(3, 5, base.hidden_size, dtype=torch.float64)
    gate, up = layer.experts.gate_up_proj[0].chunk(2)
    shared = layer.shared_experts
    gates, ups = (torch.cat(pair) for pair in ((gate, shared.gate_proj.weight), (up, shared.up_proj.weight)))
    down = torch.cat((layer.experts.down_proj[0], shared.down_proj.weight), dim=1)
    assert gates.shape[0] == 3 * base.moe_intermediate_size
    torch.testing.assert_close(layer(x), (torch.nn.functional.silu(x @ gates.mT) * (x @ ups.mT)) @ down.mT)


def test_glm4_moe_starts_as_transformers_does() -> None:
    """But for what writes into the residual stream, whatever the model that it varies. 3 layers: 0.02 / sqrt(6)."""
    base = MoEGPTConfig.preset(
        "tiny", num_hidden_layers=3, vocab_size=512, hidden_size=64, z_loss_weight=1e-4, initializer_range=0.1
    )
    config = built_in(base)["glm4_moe"].config(base)
    torch.manual_seed(0)
    ours, theirs = MoEGPTForCausalLM(config), Glm4MoeForCausalLM(to_glm4_moe(config))
    start = {name: float(weight.detach().std()) for name, weight in ours.named_parameters() if weight.dim() > 1}
    stock = {name: float(weight.detach().std()) for name, weight in theirs.named_parameters() if weight.dim() > 1}
    assert start.keys() == stock.keys() and list(stock.values()) == pytest.approx([0.02] * len(stock), rel=0.1)
    smaller = {name for name, std in start.items() if std != pytest.approx(0.02, rel=0.1)}
    assert {name.split("layers.")[1][2:] for name in smaller} == {
        "self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"
    } and len(smaller) == 9  # fmt: skip
    assert [start[name] for name in smaller] == pytest.approx([0.02 / 6**0.5] * 9, rel=0.1)
    assert config.router_balance == "none" and not config.z_loss_weight


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("cpu_*.json")), ids=lambda path: path.stem)
def test_every_variants_json_has_only_keys_that_are_read(path: Path) -> None:
    """The optimizers take different parameters: of one that the variant replaces nothing may be left that the other refuses."""
    for variant in built_in(MoEGPTConfig.preset("tiny")).values():
        settings = variant.settings(read_config(path), path)
        settings = resolve_config(settings, path, world_size=2, num_experts=8, max_steps=100)
        assert settings.get("optimizer", {}).get("type") in ("AdamW", "Muon")
        check_keys(settings, path)


def test_all_runs_have_the_same_flops_and_samples(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"name": "wide", "model": {"moe_intermediate_size": 256}, "flags": ["--document_mask"]}]))
    flags = ["--data", "shards", "--variants", "ours", "dense", "--variants_file", file, "--max_steps", 1000, "--seeds", 1, 2, 3]
    runs = learning.plan_runs(parse(*flags, "--deepspeed_config", ROOT / CONFIG))
    assert list(runs) == ["ours", "dense", "wide"] and all(len(seeds) == 3 for seeds in runs.values())
    spent = {name: seeds[0].steps * seeds[0].flops_per_token for name, seeds in runs.items()}
    assert max(spent.values()) / min(spent.values()) < 1.002
    assert runs["wide"][0].steps < 800 and runs["ours"][0].steps == 1000
    commands = {name: seeds[1].command(10) for name, seeds in runs.items()}
    for name, command in commands.items():
        given = dict(zip(command[4::2], command[5::2], strict=False))
        assert given["--seed"] == "2" and ("--document_mask" in command) == (name == "wide")


def test_every_variant_is_as_near_to_the_same_flops_as_whole_steps_are() -> None:
    names = list(built_in(MoEGPTConfig.preset("tiny")))
    runs = learning.plan_runs(parse("--data", "x", "--variants", *names, "--deepspeed_config", ROOT / CONFIG, "--max_steps", 1001))
    budget = runs["ours"][0].flops
    exact = {name: one.steps * budget / one.flops for name, (one, *_) in runs.items()}
    assert any(steps % 1 > 0.5 for steps in exact.values()), "of one the next step is the nearer"
    assert all(abs(exact[name] - one.steps) <= 0.5 for name, (one, *_) in runs.items())


def test_what_reads_the_data_most_often_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    train = SimpleNamespace(weights=None, tokens=100)
    shards: Any = SimpleNamespace(read_by=lambda parsed: SimpleNamespace(train=train))
    made: Any = [
        SimpleNamespace(name=name, tokens=tokens, flops=1.0, steps=1, is_done=lambda steps: False, parsed=lambda: None)
        for name, tokens in (("b seed_1", 200), ("a seed_1", 400), ("c seed_1", 300))
    ]
    learning.announce(made, shards)
    drain()
    assert "warning: a seed_1 reads the data 4 times; " in capsys.readouterr().err


def test_a_larger_batch_is_fewer_steps_of_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps([{"name": "twice", "deepspeed": {"train_batch_size": 32}}]))
    flags = ["--data", "x", "--variants", "ours", "--variants_file", tmp_path / "v.json", "--deepspeed_config", ROOT / CONFIG]
    runs = learning.plan_runs(parse(*flags, "--max_steps", 100))
    assert (runs["ours"][0].steps, runs["twice"][0].steps) == (100, 50)
    assert runs["ours"][0].flops == runs["twice"][0].flops and runs["ours"][0].tokens == 100 * 16 * 256


def test_few_steps_are_not_quite_the_same_flops_and_it_is_said(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of 48 for 16: four steps are one and a third."""
    (tmp_path / "v.json").write_text(json.dumps([{"name": "thrice", "deepspeed": {"train_batch_size": 48}}]))
    flags = ["--data", small_shards, "--sequence_length", 64, "--variants", "ours", "--variants_file", tmp_path / "v.json"]
    for steps, warns in ((4, True), (300, False)):
        runs = learning.plan_runs(parse(*flags, "--deepspeed_config", ROOT / CONFIG, "--max_steps", steps))
        learning.announce([one for seeds in runs.values() for one in seeds], Shards())
        drain()
        said, cost = capsys.readouterr().err, runs["ours"][0].flops
        assert ("warning: thrice trains 1 step, which is -25.0% off equal FLOPs; raise --max_steps" in said) == warns
        assert f"4 runs of {f'{0.75 * cost:.2g} to ' if warns else ''}{cost:.2g} FLOPs each" in said and "warning: ours" not in said


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"deepspeed": {"optimiser": {}}}, r'a seed_1: .*unknown key "optimiser"'),
        ({"deepspeed": {"train_batch_size": "many"}}, r"variant 'a': .*train_batch_size must be a whole number"),
        ({"flags": ["--nonsense"]}, "a seed_1: unrecognized arguments: --nonsense"),
        ({"flags": ["--max_steps=3"]}, "a seed_1: flags: --max_steps is the benchmark's own"),
        ({"model": {"vocab_size": 4097}}, "a seed_1: --data .* and the model .*config.json has a vocabulary of 4097"),
        ({"model": {"max_position_embeddings": 32}}, "a seed_1: --sequence_length 64 is beyond the 32 positions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_variants_training_would_refuse_is_said_before_the_first_trains(
    small_shards: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(small_runs, "run_leashed", refuse)
    (tmp_path / "v.json").write_text(json.dumps([{"name": "a", **variant}]))
    with pytest.raises(UserError, match=says):
        learning.run(parse(*small(small_shards, small_model, tmp_path), "--variants_file", tmp_path / "v.json"))
    assert not (tmp_path / "runs").exists()


def test_more_evaluations_or_slices_than_steps(small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    given = [*small(small_shards, small_model, tmp_path), "--max_steps", 3]
    for more in (("--slices", 4), ("--evaluations", 4)):
        with pytest.raises(UserError, match=f"{more[0]} 4 "):
            learning.run(parse(*given, "--evaluations", 1, *more))


def test_variants_on_other_data_are_judged_on_the_same_text(small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    """Two folders as one are other training data, and another validation split."""
    again = tmp_path / "again"
    again.symlink_to(small_shards)
    (tmp_path / "v.json").write_text(json.dumps([{"name": "a", "flags": ["--data", str(small_shards), str(again)]}]))
    given = [*small(small_shards, small_model, tmp_path), "--variants_file", tmp_path / "v.json"]
    with pytest.raises(UserError, match="a seed_1 has another validation split than ours seed_1"):
        learning.run(parse(*given))


def small(small_shards: Path, small_model: Path, folder: Path) -> list[object]:
    given: list[object] = ["--data", small_shards, "--model", small_model, "--deepspeed_config", ROOT / CONFIG]
    return [*given, "--sequence_length", 64, "--variants", "ours", "--seeds", 1, "--folder", folder / "runs"]


def refuse(*_: object, **__: object) -> int:
    raise AssertionError("it trained")


def test_a_variant_that_fails_is_named_and_the_others_are_shown(
    small_shards: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[str, ...]] = []

    def train(command: list[str], log: Path) -> int:
        trained.append(log.parent.parts[-2:])
        if "sign" in log.parts:
            log.write_text("error: it diverged\nthe launcher's last words\n")
            return 2
        made_up_run(log.parent / "run", [3.0, 2.0, float("nan") if "seed_2" in log.parts else 1.0])
        return 0

    monkeypatch.setattr(small_runs, "run_leashed", train)
    given = [*small(small_shards, small_model, tmp_path), "--max_steps", 10, "--evaluations", 2, "--chart", tmp_path / "c.svg"]
    result = learning.run(parse(*given, "--variants", "sign", "ours", "none", "--seeds", 1, 2))
    assert trained == [(name, seed) for seed in ("seed_1", "seed_2") for name in ("sign", "ours", "none")], "in turns"
    assert list(result["variants"]) == ["ours", "none"] and set(result["failed"]) == {"sign seed_1", "sign seed_2"}
    assert re.fullmatch(r"sign seed_1: .* exit code 2: error: it diverged \(.*log\.txt\)", result["failed"]["sign seed_1"])
    assert "nan ±nan" in capsys.readouterr().out and result["variants"]["ours"]["bits"][:2] == [3.0, 2.0]
    drawn = ET.parse(tmp_path / "c.svg").getroot()
    assert len([node for node in drawn.iter() if node.tag.endswith("circle")]) == 2 * 2  # not the means that are no numbers
    with pytest.raises(UserError, match=r"^sign seed_1: .*; sign seed_2: "):
        learning.run(parse(*given, "--variants", "sign", "--seeds", 1, 2))


def made_up_run(folder: Path, bits: list[float]) -> Path:
    """Ten steps of 100 tokens, evaluated at 0, 5 and 10; the second layer's first expert has three times the mean."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, 11):
        row = {"step": step, "samples": step, "tokens": 100 * step, "loss": 3.0, "step_seconds": 0.5}
        rows.append({**row, "grad_norm": 100.0 if step == 1 else float(step), "max_vio": [0.1, 0.2 * step]})
        rows.append({"step": step, "expert_load": [[5, 5, 5, 5], [12, 4, 0, 0] if step % 2 else [6, 2, 4, 4]]})
    rows.insert(9, {"step": 5, "samples": 5, "tokens": 500, "loss": 9.0, "grad_norm": 5.0, "skipped": "spike"})
    rows += [{"step": step, "val_loss": 2 * b, "val_bits_per_byte": b} for step, b in zip((0, 5, 10), bits, strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(finite(row)) + "\n" for row in rows))
    return folder


def test_what_is_read_out_of_a_run(tmp_path: Path) -> None:
    found = small_runs.measured(read_run(made_up_run(tmp_path / "run", [3.0, 2.0, 1.0])), 2)
    assert found["tokens"] == [0, 500, 1000] and found["bits"] == [3.0, 2.0, 1.0]
    assert found["grad_norm"] == {"median": 6.0, "largest": 10.0}  # without the first tenth
    assert found["max_vio"]["step"] == pytest.approx(0.2 * 6.5)  # the worst layer's, median of 2 to 10 but 5, which was skipped
    load = [4 * 12 + 5 * 6, 4 * 4 + 5 * 2, 5 * 4, 5 * 4]  # steps 2 to 10 together: four odd ones, five even ones
    assert found["max_vio"]["run"] == pytest.approx(max(load) / (sum(load) / 4) - 1)
    assert found["skipped"] == 1


@pytest.mark.parametrize("steps", [10, 11, 13, 400, 401, 7])
def test_runs_of_unequal_lengths_compare(tmp_path: Path, steps: int) -> None:
    """Equal FLOPs may mean a step more, and with it an evaluation more: at 100, 200, 300, 400 and 401 of 401."""
    folder = made_up_run(tmp_path / "run", [3.0, 2.0, 1.0])
    interval = steps // 4
    evaluated = [0, *(step for step in range(1, steps + 1) if step % interval == 0 or step == steps)]
    rows = [{"step": step, "val_loss": 1.0, "val_bits_per_byte": float(step)} for step in evaluated]
    last = {"step": steps, "samples": steps, "tokens": steps, "loss": 3.0, "step_seconds": 0.5, "grad_norm": 1.0, "max_vio": [0.1]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    bits = small_runs.measured(read_run(folder), 4)["bits"]
    assert len(bits) == 5 and bits[0] == 0 and bits[-1] == steps
    assert all(abs(found - part * steps / 4) <= interval / 2 for part, found in enumerate(bits))


def test_means_spread_and_chart(tmp_path: Path) -> None:
    folders = [made_up_run(tmp_path / f"{last}" / "run", [3.0, 2.0, last]) for last in (1.0, 1.3)]
    seeds = [small_runs.measured(read_run(folder), 2) for folder in folders]
    runs = {name: [{**one, "flops_per_token": 5.0} for one in seeds] for name in ("a", "b")}
    result = learning.summarize(runs)
    row = result["variants"]["a"]
    assert row["bits"] == pytest.approx([3, 2, 1.15]) and (row["least"][2], row["greatest"][2]) == (1.0, 1.3)
    assert row["spread"][2] == pytest.approx(0.3 / 2**0.5) and row["skipped"] == 2
    learning.draw_chart(tmp_path / "c.svg", result)
    drawn = ET.parse(tmp_path / "c.svg").getroot()
    lines = [node for node in drawn.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 4 and all(len(line.get("points", "").split()) == 2 for line in lines)  # not step 0: x is logarithmic


def test_a_chart_of_every_variant_tells_them_apart_and_keeps_long_names_within(tmp_path: Path) -> None:
    names = [*built_in(MoEGPTConfig()), "x" * 150 + "<1>", "x" * 150 + "<2>"]
    draw(tmp_path / "c.svg", {"tokens": [Curve(name=name, points=[(1.0, 1.0, 2.0, 3.0)]) for name in names]}, "t", unit="bits")
    nodes = list(ET.parse(tmp_path / "c.svg").getroot().iter())

    def paints(tag: str) -> list[tuple[str | None, ...]]:
        kept = [node for node in nodes if node.tag.endswith(tag) and node.get("width") in (None, "12")]
        return [tuple(node.get(name) for name in ("fill", "stroke", "stroke-dasharray")) for node in kept]

    assert len(set(paints("circle"))) == len(names) == 18 and paints("circle") == paints("rect")
    shown = [node for node in nodes if node.tag.endswith("text")][-2:]
    assert [node[0].text for node in shown] == names[-2:]
    assert [node[0].tail for node in shown] == [f"{'x' * 19}…{'x' * 17}<{number}>" for number in (1, 2)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not JSON"),
        ("{}", "must hold a list"),
        ('[{"model": {}}]', 'must be an object with a "name"'),
        ('[{"name": "a/b"}]', "a folder's as well"),
        ('[{"name": "a", "modle": {}}]', "unknown key 'modle'"),
        ('[{"name": "a", "model": []}]', "model must be an object"),
        ('[{"name": "a", "name": "b"}]', "the key 'name' stands twice"),
        ('[{"name": "a", "flags": ["-h"]}]', "--help trains nothing"),
        ('[{"name": "a"}, {"name": "a"}]', "'a' is there twice"),
        ('[{"name": "a", "model": {"hiden": 1}}]', "no field 'hiden'"),
        ('[{"name": "a", "model": {"n_group": 3}}]', "variant 'a': n_group"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "v.json"
    file.write_text(content)
    config = MoEGPTConfig.preset("tiny")
    with pytest.raises(UserError, match=says):
        [variant.config(config) for variant in chosen_variants(parse("--data", "x", "--variants").variants, file, config)]


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="no such variant; the built-in ones are ours"):
        chosen_variants(["mine"], None, MoEGPTConfig.preset("tiny"))
    with pytest.raises(UserError, match="is not a file"):
        read_variants(Path("nowhere.json"))
    with pytest.raises(UserError, match="there is no variant to train"):
        chosen_variants(parse("--data", "x", "--variants").variants, None, MoEGPTConfig.preset("tiny"))


def command(small_shards: Path, small_model: Path, folder: Path, *flags: object) -> list[str]:
    given = ["--data", small_shards, "--model", small_model, "--deepspeed_config", CONFIG, "--sequence_length", 64]
    given += ["--eval_batches", 1, "--folder", folder, "--output", folder.parent / "out.json", *flags]
    return [sys.executable, "launch/benchmark.py", "learning", *(str(flag) for flag in given)]


@pytest.mark.slow
def test_balanced_experts_are_even_and_their_twins_are_not(small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    """The smallest scale: 150 steps, after the first tenth; the worst layer, typical step and whole run."""
    flags = ["--variants", "sign", "quantile", "none", "--seeds", 5, "--max_steps", 150, "--evaluations", 1]
    done = subprocess.run(command(small_shards, small_model, tmp_path / "runs", *flags), cwd=ROOT, check=False)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "out.json").read_text())["variants"]
    for rule in ("sign", "quantile"):
        assert rows[rule]["max_vio_run"] < 0.5 * rows["none"]["max_vio_run"], rows
        assert rows[rule]["max_vio_step"] < rows["none"]["max_vio_step"], rows
    assert rows["quantile"]["max_vio_run"] < 0.2, rows  # 0.13 measured
