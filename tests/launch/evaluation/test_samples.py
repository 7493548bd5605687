"""Samples: batches equal single prompts, stop strings end them, an interrupted generation goes on as if it had not been."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.cli import UserError
from launch.evaluation import samples as samples_module
from launch.evaluation.arguments import parse_arguments
from launch.evaluation.command import sample_file
from launch.evaluation.generation import check_infilling, complete, generate_samples, prompt_of, short_of_context
from launch.evaluation.problems import Problem, read_problems
from launch.evaluation.samples import SampleFile, read_samples
from launch.generation.prompts import prompt_ids
from launch.generation.sampling import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def loaded(exported: Path) -> tuple[Any, Any]:
    from launch.exported.model import load_exported

    return load_exported(exported, device="cpu", attn_implementation="sdpa")


@pytest.fixture(scope="module")
def problems(problem_files: dict[str, Path]) -> list[Problem]:
    return [replace(problem, stops=()) for problem in read_problems("humaneval", problem_files["humaneval"]).values()]


def test_left_padded_batches_equal_single_prompts(loaded: tuple, problems: list[Problem]) -> None:
    model, tokenizer = loaded
    assert len({len(prompt_ids(prompt_of(problem), tokenizer)) for problem in problems}) == len(problems)  # so there is padding
    together = complete(model, tokenizer, problems, GREEDY)
    assert together == [complete(model, tokenizer, [problem], GREEDY)[0] for problem in problems]
    assert all(together) and len(set(together)) > 1


def test_completions_end_before_their_stop_string(loaded: tuple, problems: list[Problem]) -> None:
    model, tokenizer = loaded
    whole = complete(model, tokenizer, problems, GREEDY)
    stops = [text[len(text) // 2 :][:3] for text in whole]
    stopped = [replace(problem, stops=(stop,), ending="!") for problem, stop in zip(problems, stops, strict=True)]
    found = complete(model, tokenizer, stopped, GREEDY)
    assert found == [text[: text.index(stop)] + "!" for text, stop in zip(whole, stops, strict=True)]
    assert all(len(short) < len(text) for short, text in zip(found, whole, strict=True))


def test_a_stop_string_of_the_prompt_ends_nothing(loaded: tuple, problems: list[Problem]) -> None:
    """HumanEval's helpers stand in the prompt: the `def` after them is no end of what was not yet begun."""
    model, tokenizer = loaded
    whole = complete(model, tokenizer, problems, GREEDY)
    ends = [problem.prompt.rstrip()[-3:] for problem in problems]
    asked = [replace(problem, stops=(end,)) for problem, end in zip(problems, ends, strict=True)]
    expected = [text.partition(end)[0] for text, end in zip(whole, ends, strict=True)]
    assert complete(model, tokenizer, asked, GREEDY) == expected and all(len(text) > 10 for text in expected)


def test_a_model_may_have_several_end_tokens_or_none(
    loaded: tuple, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-4.5's own configuration names three."""
    model, tokenizer = loaded
    end = model.config.eos_token_id
    expected = complete(model, tokenizer, problems, GREEDY)
    monkeypatch.setattr(model.config, "eos_token_id", [end, end])
    assert complete(model, tokenizer, problems, GREEDY) == expected
    monkeypatch.setattr(model.config, "eos_token_id", None)
    assert all(complete(model, tokenizer, problems, GREEDY))


def test_prompts_that_fill_the_context(loaded: tuple, problems: list[Problem]) -> None:
    model, tokenizer = loaded
    long = replace(problems[0], prompt="x = 1\n" * model.config.max_position_embeddings)
    found = complete(model, tokenizer, [long, problems[1]], GREEDY)
    assert found == ["", complete(model, tokenizer, [problems[1]], GREEDY)[0]]


def test_a_long_prompt_leaves_its_neighbours_their_room(loaded: tuple, problems: list[Problem]) -> None:
    model, tokenizer = loaded
    room, text = 8, "x = 1\n" * model.config.max_position_embeddings
    ids = tokenizer(text, add_special_tokens=False).input_ids[: model.config.max_position_embeddings - room]
    long = replace(problems[0], task_id="long", prompt=tokenizer.decode(ids))
    assert short_of_context(model, tokenizer, [long, problems[1]], GREEDY) == ["long"]
    found = complete(model, tokenizer, [long, problems[1]], GREEDY)
    assert found == [complete(model, tokenizer, [one], GREEDY)[0] for one in (long, problems[1])] and found[0]


def test_another_seed_is_another_batch_everywhere(loaded: tuple, problems: list[Problem], tmp_path: Path) -> None:
    """Seeds 0 and 2 had the same samples, two places on."""
    model, tokenizer = loaded
    made = []
    for seed in (0, 2):
        file = SampleFile(tmp_path / f"{seed}.jsonl", {"total": 6})
        sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=seed)
        generate_samples(model, tokenizer, problems[:1], sampling, file, samples=6, batch_size=2)
        made.append(file.path.read_text().splitlines())
    assert len(set(made[0])) == 6 and not set(made[0]) & set(made[1])


def test_interrupted_and_continued_equals_uninterrupted(loaded: tuple, problems: list[Problem], tmp_path: Path) -> None:
    model, tokenizer = loaded
    sampling, counts = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=6, seed=5), {"samples": 3, "batch_size": 2}
    settings = {"total": 9, "temperature": 1.0}
    whole = SampleFile(tmp_path / "whole.jsonl", settings)
    generate_samples(model, tokenizer, problems, sampling, whole, **counts)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9 and len(set(lines)) == 9

    class Killed(Exception):
        pass

    class Dies(SampleFile):
        def append(self, samples: Any) -> None:
            if self.path.exists() and self.path.read_bytes().count(b"\n") >= 4:
                with open(self.path, "ab") as file:
                    file.write(lines[4] + lines[5][:10])  # a batch that was being written
                raise Killed
            super().append(samples)

    with pytest.raises(Killed):
        generate_samples(model, tokenizer, problems, sampling, Dies(tmp_path / "part.jsonl", settings), **counts)
    part = SampleFile(tmp_path / "part.jsonl", settings)
    assert part.path.read_bytes() == b"".join(lines[:5]) + lines[5][:10]
    generate_samples(model, tokenizer, problems, sampling, part, **counts)
    assert part.path.read_bytes() == whole.path.read_bytes()
    generate_samples(model, tokenizer, problems, sampling, part, **counts)  # nothing is left to do, the odd last batch included
    assert part.path.read_bytes() == whole.path.read_bytes()
    with pytest.raises(UserError, match=r"part.jsonl has samples with another temperature \(1.0, now 0.5\)"):
        SampleFile(part.path, {**settings, "temperature": 0.5}).begin(2)
    for damage in ("{", "[]"):
        (tmp_path / "part.jsonl.settings.json").write_text(damage)
        with pytest.raises(UserError, match=r"part\.jsonl\.settings\.json is damaged"):
            SampleFile(part.path, settings).begin(2)


@pytest.mark.parametrize(
    "changed", ["weights", "rope_factor", "seed", "top_p", "max_new_tokens", "batch_size", "samples", "task", "prompts", "fewer"]
)
def test_samples_of_anything_else_are_not_gone_on_with(changed: str, problems: list[Problem], tmp_path: Path) -> None:
    """Another export under the same name above all: half of the samples would be the old model's."""
    flags = ["--model", str(tmp_path), "--samples_file", str(tmp_path / "s.jsonl"), "--humaneval", "f", "--allow_code_execution"]
    arguments = parse_arguments([*flags, "--samples", "2", "--max_new_tokens", "6"])
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def settings_of(problems: list[Problem], **changes: Any) -> SampleFile:
        return sample_file(replace(arguments, **changes), {one.task_id: one for one in problems})

    with contextlib.closing(settings_of(problems)) as first:
        assert first.begin(2) == 0
        first.append([(problems[0].task_id, "x")] * 2)
    with contextlib.closing(settings_of(problems)) as again:
        assert again.begin(2) == 2
    if changed == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"others")
    other = [replace(problems[0], prompt="# another"), *problems[1:]] if changed == "prompts" else problems
    other = problems[:-1] if changed == "fewer" else other
    values = {"rope_factor": 2.0, "seed": 6, "top_p": 1.0, "max_new_tokens": 7, "batch_size": 1, "samples": 1}
    changes = {changed: values[changed]} if changed in values else {}
    another = settings_of(other, **({"humaneval": None, "mbpp": tmp_path} if changed == "task" else changes))
    with contextlib.closing(another), pytest.raises(UserError, match=r"s\.jsonl has samples with another"):
        another.begin(2)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2


def test_samples_are_whole_and_on_the_disk(tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of the system's may take a part of what it is given."""

    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    path = tmp_path / "s.jsonl"
    monkeypatch.setattr(samples_module, "open", lambda name, mode, buffering: Short(name, mode), raising=False)
    SampleFile(path, {"total": 2}).append([("a", "x = 1\n"), ("b", "")])
    monkeypatch.undo()
    assert [json.loads(line)["task_id"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert path in synced


def test_settings_are_those_of_the_samples_that_are_there(tmp_path: Path) -> None:
    """Left by an evaluation that ended before its first sample, they bind nobody; samples without any are somebody else's."""
    path = tmp_path / "s.jsonl"
    for total in (2, 3):
        with contextlib.closing(SampleFile(path, {"total": total})) as file:
            assert file.begin(1) == 0
    with contextlib.closing(SampleFile(path, {"total": 3})) as file:
        file.append([("a", "x")])
        assert file.begin(1) == 1
        (tmp_path / "s.jsonl.settings.json").unlink()
        with pytest.raises(UserError, match=r"another total \(None, now 3\)"):
            file.begin(1)
    assert path.read_text().count("\n") == 1


def test_samples_of_others_are_read_as_they_are(problems: list[Problem], tmp_path: Path) -> None:
    """Not escaped: what ends a line to `str.splitlines`, and half a surrogate pair, which a model's bytes can be."""
    texts = ["a\u2028b\x85c\x0c\x1c", "\ud800", "plain"]
    names = [problem.task_id for problem in problems]
    rows = [json.dumps({"task_id": n, "completion": t}, ensure_ascii=False) for n, t in zip(names, texts, strict=True)]
    (tmp_path / "s.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    found = read_samples(tmp_path / "s.jsonl", {problem.task_id: problem for problem in problems})
    assert found == list(zip(names, texts, strict=True))


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    first, second = (SampleFile(tmp_path / "s.jsonl", {"total": 2}) for _ in range(2))
    assert first.begin(1) == 0
    assert first.begin(1) == 0, "asked again it still holds the file"
    first.append([("a", "x")])
    with pytest.raises(UserError, match=r"another evaluation is writing .*s.jsonl; wait for it, or name another --samples_file"):
        second.begin(1)
    first.close()
    assert second.begin(1) == 1
    second.close()


def test_infilling_needs_its_tokens(loaded: tuple, problem_files: dict[str, Path]) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    _, tokenizer = loaded
    problems = list(read_problems("infilling", problem_files["infilling"]).values())
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    knows = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    knows.add_special_tokens({"additional_special_tokens": names})
    check_infilling(knows, problems)
    prefix, middle, suffix = knows.convert_tokens_to_ids(names)
    parts = [knows(text, add_special_tokens=False).input_ids for text in (problems[1].prompt, problems[1].suffix)]
    assert prompt_ids(prompt_of(problems[1]), knows) == [prefix, *parts[0], suffix, *parts[1], middle]
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<fim")]
    if any(name in plain["model"]["vocab"] for name in names):
        plain["model"]["vocab"] = {t: i for t, i in plain["model"]["vocab"].items() if t not in names}
    lacks = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)))
    with pytest.raises(UserError, match="its tokenizer has no <fim_prefix>"):
        check_infilling(lacks, problems)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples", "0"], "--samples must be at least 1, not 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--samples", "2", "--temperature", "0"], "--temperature 0 makes 2 equal samples"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(flags: list[str], sentence: str) -> None:
    """What one completion alone can tell: `test_sampler.py`."""
    task = ["--model", "hf", "--humaneval", "H.jsonl", "--allow_code_execution", "--output", "e.json"]
    with pytest.raises(UserError, match=sentence):
        parse_arguments([*task, *flags])


BROKEN = [
    ('{"task_id": "Own/0", "completion": 3}\n', "line 1: a sample has a task_id and a completion"),
    ('{"task_id": "Own/9", "completion": ""}\n', "line 1: Own/9 is none of the 3 problems"),
    ('{"task_id": "Own/0", "completion": ""}\n', "has no sample of 2 of 3 problems, Own/1 the first of them"),
    ("nothing\n", "line 1: no JSON"),
    ("\udcff\udcfe", "is no UTF-8 text at byte 0"),
]


@pytest.mark.parametrize(("text", "sentence"), BROKEN)
def test_samples_that_are_none_are_named(text: str, sentence: str, problem_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(os.fsencode(text))
    with pytest.raises(UserError) as error:
        read_samples(path, read_problems("humaneval", problem_files["humaneval"]))
    assert sentence in str(error.value)


@pytest.mark.parametrize("ending", ["", "_results.jsonl", ".settings.json", ".verdicts"])
def test_a_result_replaces_nothing_that_is_written_beside_the_samples(ending: str, tmp_path: Path) -> None:
    """All rows of results were lost to it."""
    flags = ["--humaneval", "f", "--allow_code_execution", "--score", str(tmp_path / "s"), "--output", str(tmp_path / f"s{ending}")]
    with pytest.raises(UserError, match="would replace"):
        parse_arguments(flags)
    parse_arguments([*flags, "--output", str(tmp_path / "e.json")])


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "1e30"])
def test_a_context_that_cannot_be_is_refused(factor: str) -> None:
    with pytest.raises(UserError, match="--rope_factor must be from 1"):
        parse_arguments(["--model", "m", "--data", "d", "--rope_factor", factor])
