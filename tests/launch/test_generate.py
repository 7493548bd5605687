"""`launch/generate.py` as one uses it: text as it comes, batches, JSON, filling in, mistakes, a pipe that closes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.cli import UserError
from data.terminal import drain
from launch import generate
from launch.generation import interactive
from launch.generation.answer import as_line
from launch.generation.prompts import FIM, Prompt
from launch.generation.sampler import Completion
from launch.generation.sampling import Sampling
from model import MoEGPTConfig, MoEGPTForCausalLM


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, and those for filling in."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    torch.manual_seed(1)
    config = MoEGPTConfig.preset("tiny", vocab_size=259, hidden_size=64, num_hidden_layers=2, initializer_range=0.3)
    MoEGPTForCausalLM(config).save_pretrained(folder)
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens(list(FIM))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


@pytest.fixture
def run(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(generate, "make_quiet", lambda: None)  # it would silence the tests that follow

    def call(*flags: object) -> tuple[str, str]:
        generate.main(["--model", str(exported), *(str(flag) for flag in flags)])
        drain()
        said = capsys.readouterr()
        return said.out, said.err

    return call


def test_one_answer_comes_as_text(run) -> None:  # type: ignore[no-untyped-def]
    out, err = run("--prompt", "def f(x):", "--max_new_tokens", 12, "--temperature", 0)
    assert out.startswith("def f(x):") and len(out) > len("def f(x):\n") and out.endswith("\n")
    assert err.startswith("12 tokens, ") and err.endswith(" a second\n")


def test_json_is_one_object_a_line(run) -> None:  # type: ignore[no-untyped-def]
    flags = ("--max_new_tokens", 8, "--temperature", 1.0, "--num_return_sequences", 2, "--seed", 4, "--json")
    out, _ = run("--prompt", "a", "--prompt", "import os", *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "a", "import os", "import os"]
    assert all(row["tokens"] == 8 and row["finish_reason"] == "length" and row["seed"] == 4 for row in rows)
    assert len({row["completion"] for row in rows}) > 2
    again, _ = run("--prompt", "a", "--prompt", "import os", *flags)
    assert again == out


def test_json_stays_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Completion(prompt=0, text="\U0001f600", tokens=1, finish="eos")
    for encoding, escaped in (("latin-1", True), ("utf-8", False)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        line = as_line(one, Prompt(text="a"), Sampling())
        assert json.loads(line)["completion"] == one.text and line.isascii() == escaped


def test_a_batch_as_text_names_its_prompts(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "b.txt").write_text("from a file")
    out, err = run("--prompt", "one", "--prompt_file", tmp_path / "b.txt", "--max_new_tokens", 4)
    assert "--- 1, of prompt 1, ended by length\none" in out and "--- 2, of prompt 2, ended by length\nfrom a file" in out
    assert err.startswith("8 tokens")


def test_a_stop_string_ends_it(run) -> None:  # type: ignore[no-untyped-def]
    flags = ("--prompt", "x = ", "--max_new_tokens", 30, "--temperature", 0)
    whole = json.loads(run(*flags, "--json")[0])["completion"]
    stop = whole[7:9]
    assert json.loads(run(*flags, "--json", "--stop", stop)[0])["completion"] == whole[: whole.index(stop)]
    text, _ = run(*flags, "--stop", stop)
    assert text == "x = " + whole[: whole.index(stop)] + "\n"


def test_filling_in_says_what_it_does_not_know(run) -> None:  # type: ignore[no-untyped-def]
    out, err = run("--prompt", "def area(r):", "--suffix", "return a", "--max_new_tokens", 5, "--temperature", 0)
    assert out.startswith("def area(r):") and out.endswith("return a\n")
    assert "does not say whether it was trained to fill in" in err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--prompt", "x", "--max_new_tokens", 5000), "beyond the model's 1024 positions"),
        (("--prompt", "x", "--min_p", 2), "--min_p must be from 0 to 1"),
        (("--prompt", "x", "--stop_at", "y"), "unrecognized arguments: --stop_at"),
        (("--prompt", "-", "--prompt", "-"), "can be done once"),
        (("--prompt", "def \udcff"), r"the text to continue is no UTF-8: character 4 is half a surrogate pair, '\\udcff'"),
        (("--prompt", "x", "--seed", 1 << 70), "--seed must be a number of 64 bits"),
        *((("--prompt", "x", "--rope_factor", x), "--rope_factor must be from 1 to 16,777,216") for x in (0, -1, "nan", "inf")),
        (("--prompt", "x", "--rope_factor", 4e4), "--rope_factor 40000 makes 20,480,000 positions; 16,777,216 are the most"),
        ((), "give --prompt or --prompt_file"),
    ],
)
def test_mistakes_are_named(run, flags: tuple, sentence: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    with pytest.raises(UserError, match=sentence):
        run(*flags)


def test_it_ends_quietly_when_nobody_reads(exported: Path) -> None:
    """`generate.py ... | head -c 3`."""
    command = [sys.executable, "launch/generate.py", "--model", exported, "--prompt", "x", "--max_new_tokens", "900"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 0 and b"Traceback" not in said, said[-2000:]


def test_a_session_ends_quietly_too(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(interactive, "prompts", lambda _: iter("x"))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("launch.generation.answer.write_out", gone)
    run("--max_new_tokens", 1)
