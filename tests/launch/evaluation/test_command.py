"""launch/evaluate.py as it is used: loss against plain cross entropy, samples to pass@k, mistakes as one sentence."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import ROOT

from data.cli import UserError
from data.dataset import PackedDataset
from data.terminal import drain
from launch.evaluation.arguments import parse_arguments
from launch.evaluation.command import evaluate, loss_of, tell
from launch.evaluation.loss import check_tokenizer
from launch.evaluation.sandbox.levels import Level
from launch.evaluation.sandbox.probe import Isolation
from model import MoEGPTForCausalLM

SHARED = ROOT.parent / "shared" / "data" / "eval"


def run(
    *flags: object, code: int = 0, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """before: called in the new process before the command."""
    command = [sys.executable, "launch/evaluate.py", *(str(flag) for flag in flags)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=env, preexec_fn=before)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def plain_losses(exported: Path, data: PackedDataset, samples: int) -> torch.Tensor:
    """Of every target that counts, in float64. A document attends to itself only where `data` has a document mask."""
    model = MoEGPTForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    losses = []
    for index in range(samples):
        sample = data[index]
        positions = sample.get("position_ids", torch.arange(len(sample["input_ids"])))
        starts = [0, *[i for i in range(1, len(positions)) if positions[i] == 0], len(positions)]
        for start, end in pairwise(starts):
            with torch.no_grad():
                logits = model(sample["input_ids"][None, start:end]).logits[0].double()
            losses.append(torch.nn.functional.cross_entropy(logits, sample["shift_labels"][start:end], reduction="none"))
    every = torch.cat(losses)
    counted = torch.cat([data[index]["shift_labels"] for index in range(samples)]) != -100
    return every[counted]


@pytest.mark.parametrize("document_mask", [False, True])
def test_loss_equals_plain_cross_entropy(exported: Path, small_shards: Path, tmp_path: Path, document_mask: bool) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_shards, other)
    output = tmp_path / "e.json"
    data = PackedDataset([small_shards], split="validation", sequence_length=512, document_mask=document_mask)
    samples = 6
    if document_mask:  # up to the first sample in which a document begins
        samples = 1 + next(index for index in range(len(data)) if (data[index]["position_ids"][1:] == 0).any())
    samples += samples % 2  # two batches, with other counts of targets where documents end
    flags = ["--model", exported, "--data", small_shards, other, "--sequence_length", 512]
    flags += ["--batch_size", samples // 2, "--eval_batches", 2, *(["--document_mask"] if document_mask else [])]
    run(*flags, "--output", output)
    result = json.loads(output.read_text())
    losses = plain_losses(exported, data, samples)
    expected = float(losses.mean())
    manifest = json.loads((small_shards / "manifest.json").read_text())["splits"]["validation"]
    bits = expected / math.log(2) / (manifest["text_bytes"] / manifest["tokens"])
    assert result["loss"] == pytest.approx(expected, abs=2e-4) and result["tokens"] == 2 * len(losses)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert set(result["splits"]) == {str(small_shards), str(other)}
    one = result["splits"][str(other)]
    assert one["loss"] == pytest.approx(expected, abs=2e-4) and one["samples"] == samples and one["document_mask"] == document_mask


def test_samples_scores_and_the_same_scores_again(exported: Path, problem_files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    flags = ["--humaneval", problem_files["humaneval"], "--allow_code_execution"]
    done = run(*flags, "--model", exported, "--samples", 2, "--max_new_tokens", 8, "--temperature", 1, "--output", output)
    result = json.loads(output.read_text())
    samples, results = tmp_path / "samples.jsonl", tmp_path / "samples.jsonl_results.jsonl"
    assert next(iter(result)) == "pass@1" and 0 <= result["pass@1"] <= 1 and "pass@10" not in result
    assert result["samples"] == 6 and result["problems"] == 3 and result["sampling"]["temperature"] == 1
    assert result["isolation"]["level"] in ("bubblewrap", "namespaces", "limits") and "sandbox: " in done.stdout
    made = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["task_id"] for row in made] == [f"Own/{n}" for n in (0, 0, 1, 1, 2, 2)]
    judged = [json.loads(line) for line in results.read_text().splitlines()]
    assert [{name: row[name] for name in ("task_id", "completion")} for row in judged] == made
    assert all(set(row) == {"task_id", "completion", "result", "passed"} for row in judged)
    again = tmp_path / "again.json"
    run("--score", samples, *flags, "--output", again)
    assert json.loads(again.read_text())["pass@1"] == result["pass@1"]


def test_what_is_refused_is_before_the_loss_is_measured_which_is_kept(
    exported: Path,
    small_shards: Path,
    problem_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss of hours was thrown away for a flag, then a finished result for the loss alone."""
    output, samples = tmp_path / "e.json", tmp_path / "samples.jsonl"
    flags = ["--model", exported, "--data", small_shards, "--eval_batches", 1, "--batch_size", 1, "--output", output]

    def evaluated(*more: object, task: str = "humaneval") -> None:
        asked = (*flags, f"--{task}", problem_files[task], "--allow_code_execution", *more)
        evaluate(parse_arguments([str(flag) for flag in asked]))

    def unwanted(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("launch.evaluation.command.loss_of", unwanted)
        samples.write_text('{"task_id": "Own/0", "completion": ""}\n')
        with pytest.raises(UserError, match="has samples with another task"):
            evaluated()
        samples.unlink()
        with pytest.raises(UserError, match="--infilling needs a model"):
            patch.setattr("launch.generation.prompts.FIM", ("<nowhere>",))
            evaluated(task="infilling")
        patch.setattr("launch.exported.model.load_exported", unwanted)
        with pytest.raises(UserError, match="--top_p must be above 0"):
            evaluated("--top_p", 2)
    with monkeypatch.context() as patch:
        patch.setattr("launch.evaluation.generation.complete", unwanted)
        with pytest.raises(AssertionError):
            evaluated()
        assert json.loads(output.read_text())["loss"] > 0
        output.write_text('{"pass@1": 1.0}')
        capsys.readouterr()
        with pytest.raises(AssertionError):
            evaluated()
    drain()
    assert output.read_text() == '{"pass@1": 1.0}' and capsys.readouterr().out.startswith("loss ")
    evaluated("--max_new_tokens", 2, "--samples_file", tmp_path / "other.jsonl")
    drain()
    said = "".join(capsys.readouterr())
    assert said.count("nats per token") == said.count("pass@1 ") == 1
    assert {"pass@1", "loss"} <= json.loads(output.read_text()).keys()


def test_too_many_workers_are_refused_before_a_model_is_loaded(
    problem_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolation = Isolation(level=Level(name="limits", user_namespace=False, python="python"), holds={}, reason="")
    monkeypatch.setattr("launch.evaluation.command.prepare_isolation", lambda *_, **__: isolation)
    monkeypatch.setattr("os.getuid", lambda: 0)
    flags = ["--model", tmp_path / "nowhere", "--humaneval", problem_files["humaneval"], "--allow_code_execution"]
    flags += ["--output", tmp_path / "e.json", "--workers", 300]
    with pytest.raises(UserError, match="--workers must be 256 or less"):
        evaluate(parse_arguments([str(flag) for flag in flags]))


@pytest.mark.parametrize("closed", [False, True])
def test_scores_count_what_passes(problem_files: dict[str, Path], tmp_path: Path, closed: bool) -> None:
    """`closed`: the command has no standard input, and the judge's pipes do not get its number."""
    right = [json.loads(line) for line in problem_files["humaneval"].read_text().splitlines()]
    rows = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in right]
    rows += [
        {"task_id": "Own/0", "completion": "    return None\n"},
        {"task_id": "Own/1", "completion": "    import os; os._exit(0)\n"},
    ]
    samples = tmp_path / "mine.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "e.json"
    before = partial(os.close, 0) if closed else None
    flags = ["--humaneval", problem_files["humaneval"], "--allow_code_execution", "--output", output]
    done = run("--score", samples, *flags, before=before)
    result = json.loads(output.read_text())
    assert result["pass@1"] == pytest.approx((0.5 + 0.5 + 1) / 3) and (result["samples"], result["passed"]) == (5, 3)
    assert "3 passed" in done.stdout
    judged = [json.loads(line) for line in (tmp_path / "mine.jsonl_results.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in judged] == [True, True, True, False, False]


@pytest.mark.parametrize("file", ["canonical", "stubs"])
@pytest.mark.skipif(not SHARED.is_dir(), reason="HumanEval is not here (../shared/data/eval)")
def test_all_of_humaneval(file: str, tmp_path: Path) -> None:
    import gzip

    problems = SHARED / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(problems.read_bytes()).splitlines()]
    samples = tmp_path / "samples.jsonl"
    completions = [row["canonical_solution"] if file == "canonical" else "    pass\n" for row in rows]
    lines = [json.dumps({"task_id": row["task_id"], "completion": text}) for row, text in zip(rows, completions, strict=True)]
    samples.write_text("\n".join(lines) + "\n")
    output = tmp_path / "e.json"
    run("--score", samples, "--humaneval", problems, "--allow_code_execution", "--output", output)
    result = json.loads(output.read_text())
    assert (result["passed"], result["pass@1"]) == ((164, 1.0) if file == "canonical" else (0, 0.0))
    assert result["own_solution_fails"] == {}


def test_lines_beside_a_file_may_be_lost_and_a_result_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w") as full:  # which closing writes again
        monkeypatch.setattr(sys, "stdout", full)
        tell("loss 1", Path("e.json"))
        drain()
        with pytest.raises(OSError, match="standard output"):
            tell("loss 1", None)


def test_a_level_that_does_not_hold_is_refused_where_it_must(problem_files: dict[str, Path], tmp_path: Path) -> None:
    """As on a machine whose kernel lacks Landlock: the limits alone leave the files open."""
    samples = tmp_path / "s.jsonl"
    samples.write_text("".join(json.dumps({"task_id": f"Own/{n}", "completion": ""}) + "\n" for n in range(3)))
    flags = ["--score", samples, "--humaneval", problem_files["humaneval"], "--allow_code_execution", "--isolation", "limits"]
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import launch.evaluation.sandbox.program as program\n"
        "plain = program.program_text\n"
        "program.program_text = lambda: plain().replace('return max(0, libc.syscall(CREATE_RULESET', "
        "'return 0 * max(0, libc.syscall(CREATE_RULESET')\n"
    )
    paths = f"{tmp_path}:{ROOT}"
    done = run(*flags, "--require_isolation", code=2, PYTHONPATH=paths)
    assert done.stderr.startswith("error: the sandbox (limits) does not hold here for: files") and "bubblewrap" in done.stderr
    done = run(*flags, PYTHONPATH=paths)
    assert "warning: the sandbox (limits) does not hold here for: files" in done.stderr


def test_a_stock_model_has_no_loss_here(exported: Path) -> None:
    """It was a traceback: such a model takes no targets by that name."""
    arguments = parse_arguments(["--model", str(exported), "--data", "shards"])
    with pytest.raises(UserError, match="is a Linear; leave it out"):
        loss_of(arguments, torch.nn.Linear(1, 1))


MISTAKES = [
    (["--model", "EXPORTED"], "nothing to measure"),
    (["--data", "nowhere"], "--model is missing"),
    (["--model", "EXPORTED", "--data", "nowhere"], "no shards at nowhere"),
    (["--model", "EXPORTED", "--data", "SHARDS", "SHARDS"], "--data names a folder twice"),
    (["--model", "EXPORTED", "--humaneval", "FILE", "--output", "e.json"], "add --allow_code_execution"),
    (["--score", "s.jsonl", "--humaneval", "FILE"], "add --allow_code_execution"),
    (["--score", "s.jsonl", "--allow_code_execution"], "--score needs the problems"),
    (["--score", "nowhere.jsonl", "--humaneval", "FILE", "--allow_code_execution"], "--score nowhere.jsonl: there is no such file"),
    (["--model", "EXPORTED", "--humaneval", "FILE", "--allow_code_execution"], "beside --output, which is missing"),
    (["--model", "EXPORTED", "--humaneval", "FILE", "--mbpp", "FILE"], "not allowed with"),
    (["--score", "e.json", "--humaneval", "FILE", "--allow_code_execution", "--output", "e.json"], "would replace"),
    (["--model", "EXPORTED", "--humaneval", "FILE", "--allow_code_execution", "--output", "FILE"], "would replace the problems"),
    (
        ["--model", "EXPORTED", "--humaneval", "FILE", "--allow_code_execution", "--output", "samples.jsonl"],
        "--output samples.jsonl would replace",
    ),
    (["--model", "EXPORTED", "--data", "SHARDS", "--batch_size", "0"], "must be at least 1"),
    (["--model", "EXPORTED", "--data", "SHARDS", "--eval_batches", "-1"], "--eval_batches must be 0 or a number above it, not -1"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_mistakes_are_one_sentence(
    flags: list[str], sentence: str, exported: Path, small_shards: Path, problem_files: dict[str, Path], tmp_path: Path
) -> None:
    names = {"EXPORTED": exported, "SHARDS": small_shards, "FILE": problem_files["humaneval"], "e.json": tmp_path / "e.json"}
    done = run(*(names.get(flag, flag) for flag in flags), code=2)
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ") and sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_tokenizer_is_refused(exported: Path, small_shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    known = json.loads((other / "tokenizer.json").read_text())
    saved_anew = json.dumps(known | {"post_processor": None}, indent=2)  # another file, the same ids
    check_tokenizer(saved_anew.encode(), PackedDataset([small_shards], split="validation", sequence_length=8))
    (other / "tokenizer.json").write_text(json.dumps(known | {"normalizer": {"type": "Lowercase"}}))
    done = run("--model", other, "--data", small_shards, code=2)
    assert "another tokenizer" in done.stderr
