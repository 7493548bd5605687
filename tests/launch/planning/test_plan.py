"""`launch/plan.py` as a user meets it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import ROOT, metrics

from data.cli import UserError
from launch.planning.answer import share_near
from launch.planning.expectation import beside_measured, duration_line, job_of_run
from launch.planning.memory import plan_memory
from launch.planning.past import rest_of
from model.config_json import PRESETS_FOLDER

USUAL = ("--model", "800m", "--gpu", "a100-80gb", "--num_gpus", 8, "--deepspeed_config", "ds_configs/ep8_zero2.json")


def plan(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", *(str(flag) for flag in flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def answer(*flags: object) -> dict:
    done = plan(*flags, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_usual_question() -> None:
    found = answer(*USUAL, "--tokens", "131e9", "--price", "1.8")
    assert found["parameters"]["total"] == pytest.approx(812e6, rel=0.001)
    assert found["parameters"]["active"] == pytest.approx(472e6, rel=0.001)
    parts = dict(found["memory_gb"])
    total, host = parts.pop("total"), parts.pop("host")
    worst = parts.pop("worst")
    assert sum(parts.values()) == pytest.approx(total, abs=0.01) and host == 0 and worst > 0
    # 206 M dense and 75 M expert parameters on a rank: in bf16; state of 1/8 of the dense ones and of all 75 M, 12 bytes each.
    assert parts["weights"] == pytest.approx(0.56, abs=0.3) and parts["optimizer"] == pytest.approx(1.22, abs=0.01)
    assert found["fits"] is True and total < found["device_memory_gb"]
    speed = found["tokens_per_second"]
    assert found["days"] == pytest.approx(131e9 / speed / 86_400)
    assert found["cost"] == pytest.approx(131e9 / speed / 3600 * 8 * 1.8)
    assert found["mfu"] == pytest.approx(speed * found["flops_per_token"] / (8 * 312e12))
    assert 0.2 < found["mfu"] < 0.6
    assert sum(found["limits"].values()) == pytest.approx(1, abs=0.001)


def test_where_the_build_is_the_fullest_moment_it_is_said() -> None:
    said = plan("--model", "4b", "--gpu", "h200", "--num_gpus", "8", "--activation_checkpointing", "full").stdout
    told = "that is at the start, where each rank builds the whole model in fp32; training takes less"
    assert "building the model, beyond that" in said and told in said
    assert told not in plan(*USUAL).stdout


def test_a_budget_below_a_step_is_a_step() -> None:
    """Training refuses --max_steps 0."""
    assert answer(*USUAL, "--tokens", "1e5")["steps"] == 1


def test_a_written_path_can_be_pasted(tmp_path: Path) -> None:
    assert f"train with --deepspeed_config '{tmp_path / 'to fit.json'}'" in plan(*USUAL, "--write", tmp_path / "to fit.json").stdout


def test_in_words() -> None:
    done = plan(*USUAL, "--tokens", "131e9", "--curve")
    assert done.returncode == 0 and not done.stderr
    for said in (
        "812 M parameters, 472 M active",
        "fits: ",
        "tokens/s, MFU",
        "days",
        "--max_steps 249863",
        "NVLink 3",
        "fastest that fit safely",
        "512",
    ):
        assert said in done.stdout
    assert "assumptions" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("flags", "batch"),
    [
        (("--num_nodes", 8), {"train_micro_batch_size_per_gpu": [8, 4]}),
        # 84 GPUs: 256 sequences are 3.05 each, so three, of which no 8 and no 2 make a micro-batch
        (("--num_nodes", 12, "--num_gpus", 7, "--deepspeed_config", "ds_configs/ep1_zero2.json"), {"train_batch_size": [256, 252]}),
        (("--num_nodes", 64), {"train_batch_size": [256, 512], "train_micro_batch_size_per_gpu": [8, 1]}),
    ],
)
def test_a_batch_made_for_fewer_gpus_is_planned_as_it_could_train(flags: tuple, batch: dict) -> None:
    asked = (*USUAL, *flags)
    found = answer(*asked)
    assert found["to_train"].items() >= batch.items()
    assert found["batch"]["global_batch"] == found["batch"]["micro_batch"] * found["batch"]["accumulation"] * found["gpus"]
    point = next((p for p in found["curve"] if p["gpus"] == found["gpus"]), found["layout"])
    assert point["micro_batch"] == found["batch"]["micro_batch"]
    said = " ".join(plan(*asked).stdout.split())
    key, (old, new) = next(iter(batch.items()))
    assert f"does not train on {found['gpus']} GPUs as it is; planned with" in said and f"{key} from {old} to {new}" in said
    assert answer(*USUAL)["to_train"] == {}


@pytest.mark.parametrize(
    ("train", "ranks", "micro", "share"),
    [
        (256, 7, 8, 35),  # not 37, a prime
        (256, 6, 8, 42),  # not 43, a prime
        (256, 84, 8, 3),
        (256, 512, 8, 1),
        (222, 6, 8, 37),  # shared out evenly: stays
        (256, 7, None, 37),  # no micro-batch to keep to
    ],
)
def test_a_share_that_micro_batches_divide_comes_before_the_nearest(train: int, ranks: int, micro: int | None, share: int) -> None:
    assert share_near(train / ranks, micro) == share


def test_seven_gpus_keep_a_usable_micro_batch() -> None:
    found = answer(*USUAL, "--num_gpus", 7, "--deepspeed_config", "ds_configs/ep1_zero2.json")
    assert found["batch"]["micro_batch"] > 1 and abs(found["batch"]["global_batch"] - 256) <= 0.05 * 256


def test_answers_at_once_and_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert plan(*USUAL).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2.0  # 0.2 s of CPU time here; torch and transformers alone take 3
    code = "import sys, launch.planning.answer; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "v100"], "--gpu v100 is not known; known are a100-40gb"),
        ([], "--gpu is missing, such as --gpu a100-80gb"),
        (["--gpu", "h200", "--model", "7b"], "--model 7b is neither a preset (4b, 60m, 800m, tiny) nor a config.json"),
        (["--gpu", "h200", "--deepspeed_config", "none.json"], "--deepspeed_config none.json is not a file"),
        (["--gpu", "h200", "--num_gpus", 0], "--num_gpus must be at least 1, not 0"),
        (["--gpu", "h200", "--num_gpus", "many"], "argument --num_gpus: invalid int value: 'many'"),
        (["--gpu", "h200", "--num_nodes", -1], "--num_nodes must be at least 1, not -1"),
        (["--gpu", "h200", "--num_gpus", 10**7], "--num_gpus times --num_nodes must be at most 1,048,576, not 10,000,000"),
        (["--gpu", "h200", "--num_gpus", 1024, "--num_nodes", 1025], "must be at most 1,048,576, not 1,049,600"),
        (
            ["--gpu", "h200", "--num_gpus", 4, "--deepspeed_config", "ds_configs/ep8_zero2.json"],
            "autoep_size 8 does not divide the 4 ranks",
        ),
        (
            ["--gpu", "h200", "--sequence_length", 4096],
            "--sequence_length 4096 is beyond the 2048 positions of 800m; copy the model's config.json",
        ),
        (["--gpu", "h200", "--tokens", "nan"], "--tokens must be at least 1"),
        (["--gpu", "h200", "--tokens", "14.5B"], "--tokens: '14.5B' must be a number such as 14.5e9"),
        (["--gpu", "h200", "--price", -1], "--price must be 0 or more"),
        (["--gpu", "h200", "--price", 2], "--price needs --tokens, such as --tokens 131e9"),
        (["--gpu", "h200", "--write", "README.md"], "--write README.md exists; name a new file"),
        (["--gpu", "h200", "--write", "no/such/folder.json"], "--write no/such/folder.json: there is no folder no/such"),
    ],
)
def test_a_mistake_is_one_sentence(flags: list, said: str) -> None:
    done = plan(*flags)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_training_refuses_is_not_planned(tmp_path: Path) -> None:
    path, settings = tmp_path / "fp16.json", json.loads((ROOT / "tests" / "fixtures" / "fp16.json").read_text())
    path.write_text(json.dumps(settings))
    assert plan("--gpu", "a100-80gb", "--model", "tiny", "--num_gpus", 1, "--deepspeed_config", path).returncode == 0
    path.write_text(json.dumps(settings | {"zero_optimization": {"stage": 0}}))
    done = plan("--gpu", "a100-80gb", "--model", "tiny", "--num_gpus", 1, "--deepspeed_config", path)
    assert done.returncode == 2 and "fp16.enabled needs zero_optimization.stage 1, 2 or 3" in done.stderr
    for changes, said in (
        ({"bf16": {"enabled": True}}, "bf16.enabled and fp16.enabled cannot both be true"),
        (
            {"fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "bf16"}},
            "sums float32 gradients in their own dtype alone",
        ),
    ):
        path.write_text(json.dumps(settings | {"zero_optimization": {"stage": 0}} | changes))
        done = plan("--gpu", "a100-80gb", "--model", "tiny", "--num_gpus", 1, "--deepspeed_config", path)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients must be false, not true"),
        ({"gradient_clipping": -1}, "gradient_clipping must be 0 (none) or a norm, not -1"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile takes the whole model"),
        ({"optimizer": {"params": {}}}, '"optimizer" must name a type'),
    ],
)
def test_a_value_that_training_refuses_is_refused_in_its_words(changes: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_configs" / "ep8_zero2.json").read_text()) | changes))
    done = plan(*USUAL, "--deepspeed_config", path)
    assert done.returncode == 2 and f"{path}: " in done.stderr and said in done.stderr


def test_a_model_that_fits_nowhere(tmp_path: Path) -> None:
    """Four times as deep as 4b, on one small card."""
    deep = json.loads((PRESETS_FOLDER / "4b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**deep, "num_hidden_layers": 96}))
    flags = ["--model", tmp_path, "--gpu", "rtx-4090", "--num_gpus", 1]
    done = plan(*flags)
    assert done.returncode == 0 and "does not fit: " in done.stdout and "no layout of this job fits" in done.stdout
    done = plan(*flags, "--write", tmp_path / "none.json")
    assert done.returncode == 2 and "no layout fits" in done.stderr and not (tmp_path / "none.json").exists()


def test_a_written_json_trains(small_shards: Path, small_model: Path, forked_train, tmp_path: Path) -> None:
    """The fastest layout for two cards, trained on two CPU ranks."""
    written = tmp_path / "planned.json"
    base = tmp_path / "base.json"
    given = json.loads((ROOT / "ds_configs/cpu_ep2_zero2.json").read_text())
    base.write_text(json.dumps({**given, "train_batch_size": 8}))
    flags = ["--model", small_model, "--gpu", "rtx-4090", "--num_gpus", 2, "--sequence_length", 64]
    found = answer(*flags, "--deepspeed_config", base, "--write", written)
    assert found["written"] == str(written)
    run = tmp_path / "run"
    flags = ["--data", small_shards, "--model", small_model, "--output", run, "--sequence_length", 64, "--max_steps", 3]
    flags += ["--eval_interval", 0, "--log_interval", 1, "--wandb", "disabled", "--deepspeed_config", written]
    done = forked_train(2, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in metrics(run) if "loss" in row]
    assert rows[-1]["step"] == 3 and rows[-1]["tokens"] == 3 * 8 * 64
    fastest = found["alternatives"][0]
    held = json.loads((run / "config.json").read_text())["deepspeed"]
    assert held["train_micro_batch_size_per_gpu"] == fastest["micro_batch"]
    assert held["expert_parallel"]["autoep_size"] == fastest["expert_ranks"]
    assert held["zero_optimization"]["stage"] == fastest["zero_stage"]


def test_output_that_nobody_reads_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "launch/plan.py", *map(str, USUAL), "--curve"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run of `800m` on eight GPUs leaves behind, cut short while it logged."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = json.loads((ROOT / "ds_configs/ep8_zero2.json").read_text())
    config.update(gradient_accumulation_steps=4)
    held = {
        "model": json.loads((PRESETS_FOLDER / "800m.json").read_text()),
        "deepspeed": config,
        "sequence_length": 2048,
        "world_size": 8,
        "arguments": {"max_steps": 1000, "activation_checkpointing": None},
    }
    (folder / "config.json").write_text(json.dumps(held))
    tokens = 256 * 2048
    rows = [
        {"step": n, "loss": 3.0, "tokens": n * tokens, "tokens_per_second": 200_000.0 if n > 10 else 1.0} for n in range(1, 101)
    ]
    lines = [json.dumps(row) for row in [*rows, {"step": 100, "val_loss": 3.0}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 101, "tok')
    return folder


def test_the_rest_of_a_run(run_folder: Path) -> None:
    found = answer("--from", run_folder, "--gpu", "a100-80gb", "--price", 2)
    assert found["done"] == {"steps": 100, "tokens": 100 * 256 * 2048}
    assert found["left"]["steps"] == 900 and found["tokens_per_second"] == 200_000  # the slow first steps are not the speed
    assert found["days"] == pytest.approx(900 * 256 * 2048 / 200_000 / 86_400)
    assert found["cost"] == pytest.approx(found["days"] * 24 * 8 * 2)
    planned = answer(*USUAL)
    assert found["planned_tokens_per_second"] == pytest.approx(planned["tokens_per_second"])
    assert found["memory_gb"] == planned["memory_gb"]
    done = plan("--from", run_folder)
    assert done.returncode == 0 and "900 steps, 39 minutes" in done.stdout
    done = plan("--from", run_folder, "--tokens", 100 * 256 * 2048)
    assert done.returncode == 0 and "nothing is left" in done.stdout
    done = plan("--from", run_folder, "--num_gpus", 4)  # a flag that it cannot obey
    assert done.returncode == 2 and "--num_gpus does not go with --from" in done.stderr


def test_a_run_is_read_as_the_report_reads_it(run_folder: Path) -> None:
    """Steps that were trained again count once, and bytes that are no text spoil their own line alone."""
    path = run_folder / "metrics.jsonl"
    again = {"step": 60, "loss": 3.0, "tokens": 60 * 256 * 2048, "tokens_per_second": 300_000.0}
    path.write_bytes(path.read_bytes() + b"\xff\n" + json.dumps(again).encode() + b"\n")
    found = answer("--from", run_folder)
    assert found["done"] == {"steps": 60, "tokens": 60 * 256 * 2048} and found["tokens_per_second"] == 200_000


def test_after_a_rollback_what_is_left_is_counted_in_steps(run_folder: Path) -> None:
    """Its tokens go on, and those of 40 steps count twice."""
    with (run_folder / "metrics.jsonl").open("a") as file:
        row = {"step": 61, "loss": 3.0, "tokens": 101 * 256 * 2048, "tokens_per_second": 200_000.0}
        file.write("\n" + json.dumps(row) + "\n")
    found = answer("--from", run_folder)
    assert found["done"] == {"steps": 61, "tokens": 101 * 256 * 2048} and found["left"]["steps"] == 939


def test_a_run_that_says_its_mfu_is_a_gpus(run_folder: Path) -> None:
    """Its memory is a GPU's, though nobody named the card; a CPU's is less."""
    on_a_cpu = answer("--from", run_folder)["memory_gb"]
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 102, "loss": 3.0, "tokens": 1, "tokens_per_second": 1.0, "mfu": 0.4}\n')
    assert answer("--from", run_folder)["memory_gb"] == answer(*USUAL)["memory_gb"] != on_a_cpu


def test_a_run_of_two_nodes_is_not_planned_as_one(run_folder: Path) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    config["deepspeed"]["gradient_accumulation_steps"] = 2
    (run_folder / "config.json").write_text(json.dumps({**config, "world_size": 16}))
    found = answer("--from", run_folder, "--gpu", "a100-80gb")["planned_tokens_per_second"]
    assert found == pytest.approx(answer(*USUAL, "--num_nodes", 2)["tokens_per_second"])


def test_a_preset_with_fewer_experts_than_gpus_has_a_default() -> None:
    assert answer("--gpu", "a100-80gb", "--model", "60m", "--num_gpus", 8)["layout"]["expert_ranks"] == 4


def test_a_change_that_makes_it_fit_can_be_pasted() -> None:
    flags = ("--model", "4b", "--gpu", "l40s", "--num_gpus", 1, "--deepspeed_config", "ds_configs/ep1_zero2.json")
    assert answer(*flags)["to_fit"] == {
        "activation_checkpointing.mode": ["none", "selective"],
        "optimizer.params.fused": [True, None],
        "optimizer.params.torch_adam": [True, None],
        "zero_optimization.offload_optimizer": [None, {"device": "cpu", "pin_memory": True}],
    }
    said = " ".join(plan(*flags).stdout.split())
    assert 'zero_optimization.offload_optimizer from unset to {"device": "cpu", "pin_memory": true}' in said
    assert "optimizer.params.fused from true to unset" in said  # which null in the file would not be


def test_a_change_keeps_the_batch(tmp_path: Path) -> None:
    """Where the file has a number for each of the three, which training holds against each other."""
    config = json.loads((ROOT / "ds_configs/ep8_zero2.json").read_text())
    config.update(
        train_batch_size=512,
        train_micro_batch_size_per_gpu=64,
        gradient_accumulation_steps=1,
        activation_checkpointing={"mode": "full"},
    )
    (tmp_path / "all.json").write_text(json.dumps(config))
    to_fit = answer("--model", "4b", "--gpu", "rtx-5090", "--deepspeed_config", tmp_path / "all.json")["to_fit"]
    assert to_fit == {"train_micro_batch_size_per_gpu": [64, 16], "gradient_accumulation_steps": [1, "auto"]}


def test_a_folder_without_a_run(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no config.json, so no run" in plan("--from", tmp_path / "empty").stderr
    (run_folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has no logged step yet" in plan("--from", run_folder).stderr
    config = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps({**config, "model": {"hidden_size": "x"}}))
    with (run_folder / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": 3.0, "tokens": 1, "tokens_per_second": 1.0}\n')
    done = plan("--from", run_folder)
    assert (
        done.returncode == 2
        and "config.json does not describe a run: hidden_size must be a whole number of at least 1, got 'x'" in done.stderr
    )
    asked: Any = SimpleNamespace(from_run=run_folder, gpu=None, tokens=None, price=None)
    for key, value in wrong_values():
        (run_folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=r"config\.json (has no usable|does not describe a run)"):
            rest_of(asked)
    (run_folder / "config.json").write_text("{}")
    done = plan("--from", run_folder)
    assert done.returncode == 2 and "config.json has no 'model'" in done.stderr and len(done.stderr.splitlines()) == 1


def wrong_values() -> list[tuple[str, object]]:
    kinds: list[tuple[str, object]] = [(key, wrong) for key in ("model", "deepspeed", "arguments") for wrong in ([], "x", None)]
    return [*kinds, ("deepspeed", {}), ("arguments", {}), *(("world_size", wrong) for wrong in (0, -1, "2", None, True))]


def test_training_says_what_to_expect(small_shards: Path, small_model: Path, forked_train, tmp_path: Path) -> None:
    """The plan's memory beside what the process grew by, and at the end the next command."""
    flags = ["--data", small_shards, "--model", small_model, "--output", tmp_path / "a run", "--sequence_length", 64]
    flags += ["--max_steps", 2, "--eval_interval", 0, "--log_interval", 1, "--wandb", "disabled"]
    done = forked_train(1, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(r"memory of a rank: ([\d.]+) GB of tensors by the plan, the process grew by (-?[\d.]+) GB", done.stderr)
    assert said, done.stderr  # this model is so small that freed memory can hold it: growth may round to nothing
    job = job_of_run(json.loads((tmp_path / "a run/config.json").read_text()), ranks_per_node=1)
    assert float(said[1]) == pytest.approx(plan_memory(job, on_gpu=False).live / 1e9, abs=0.006)
    assert f"next: python launch/export.py --checkpoint '{tmp_path}/a run' --output '{tmp_path}/a run-hf'" in done.stderr
    assert "steps should take about" not in done.stderr  # of a CPU nobody has a data sheet


def test_the_job_of_a_run_has_its_nodes(run_folder: Path) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    job = job_of_run(config, ranks_per_node=4)
    assert (job.ranks, job.ranks_per_node) == (8, 4)


def test_the_expected_time_of_a_known_card(run_folder: Path) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    job = job_of_run(config, ranks_per_node=8)
    line = duration_line(job, "NVIDIA A100-SXM4-80GB", range(249_863), save_interval=1000)
    days = answer(*USUAL, "--tokens", 249_863 * 256 * 2048)["days"]
    assert line is not None and "a checkpoint every 21 minutes (--save_interval 1000)" in line
    assert f"249,863 steps should take about {days:.1f} days" in line and "for a100-80gb" in line
    assert duration_line(job, "NVIDIA GeForce GTX 1080", range(10), save_interval=5) is None
    assert duration_line(job, None, range(10), save_interval=5) is None
    for steps, evaluations, said in (
        (
            range(249_863),
            100,
            "every 21 minutes (--save_interval 1000) and at a new best validation loss, looked for every 2 minutes",
        ),
        (range(900), 100, "a checkpoint at a new best validation loss, looked for every 2 minutes (--eval_interval 100): "),
        (range(1000), 1000, "a checkpoint at the end alone (--save_interval 1000): "),
        (range(900, 1100), 0, "a checkpoint every 21 minutes (--save_interval 1000): "),
        (range(1000, 1900), 0, "a checkpoint at the end alone (--save_interval 1000): "),
    ):
        line = duration_line(job, "NVIDIA A100-SXM4-80GB", steps, save_interval=1000, eval_interval=evaluations)
        assert line is not None and said in line and f"{len(steps):,} steps" in line
    beside = beside_measured(job, "NVIDIA A100-SXM4-80GB", 1.1 * days * 86_400 / 249_863)
    assert beside is not None and beside["device"] == "a100-80gb" and beside["measured_to_predicted"] == pytest.approx(1.1)
    assert beside_measured(job, None, 1.0) is None and beside_measured(job, "NVIDIA GeForce GTX 1080", 1.0) is None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_gpus_peak(mode: str, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`800m` cut to 6 layers on one GPU: what training itself prints as planned and as allocated, within 10 %."""
    model = {**json.loads((PRESETS_FOLDER / "800m.json").read_text()), "num_hidden_layers": 6, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moe_gpt", **model}))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    command = [sys.executable, "launch/train.py", "--data", small_shards, "--model", tmp_path / "config.json", "--max_steps", 2]
    command += ["--output", tmp_path / "run", "--eval_interval", 0, "--wandb", "disabled", "--activation_checkpointing", mode]
    command += ["--deepspeed_config", ROOT / "ds_configs/ep1_zero2.json"]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(r"([\d.]+) GB of tensors by the plan, allocated at most ([\d.]+) GB", done.stderr)
    assert said and float(said[1]) == pytest.approx(float(said[2]), rel=0.1), done.stderr
