"""`launch/benchmark.py balance`: what theory says of noise comes out, and a real model's routers are read."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.cli import UserError
from launch.benchmarks import balance
from launch.benchmarks.balance import Choice, compare
from model import MoEGPTConfig, MoEGPTForCausalLM

ROW = 32


def choice(**sizes: int) -> Choice:
    return Choice(MoEGPTConfig.preset("tiny", **{"n_group": 1, "topk_group": 1, **sizes}))


def scores(*, rows: int, of_row: float) -> Tensor:
    """`[1, T, E]`: uneven experts, and rows whose tokens have a taste of their own in common."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, ROW, 8, generator=generator) + torch.linspace(-1, 1, 8)
    logits += of_row * torch.randn(rows, 1, 8, generator=generator)
    return logits.flatten(0, 1).sigmoid().unsqueeze(0)


def test_max_vio_is_counted_by_hand() -> None:
    two = choice(n_routed_experts=4, num_experts_per_tok=2)
    scores_TE = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.1, 0.8, 0.2], [0.3, 0.9, 0.1, 0.8]])
    assert two.max_vio(scores_TE, torch.zeros(4)) == pytest.approx(2 / 1.5 - 1)  # loads 2, 2, 1, 1
    assert two.max_vio(scores_TE, torch.tensor([9.0, 0.0, 0.0, 0.0])) == pytest.approx(3 / 1.5 - 1)


def test_noise_is_as_theory_has_it() -> None:
    """Of independent tokens it halves with four times as many; a bias from one step alone has as much again, sqrt 2 in all."""
    scores_YTE = scores(rows=4096, of_row=0.0)
    best = choice().evening(scores_YTE[0], torch.zeros(8)).unsqueeze(0)
    few, many = (compare(choice(), scores_YTE, best, tokens, [0.0, 0.9]) for tokens in (1024, 4096))
    worst = {name: few[name]["worst"] for name in few if name != "steps"}
    assert few["steps"] == 4 * many["steps"] == 128
    assert worst["constant"] / many["constant"]["worst"] == pytest.approx(2, rel=0.15)
    assert worst["shuffled"] == pytest.approx(worst["constant"], rel=0.1)
    assert worst["average 0"] / worst["constant"] == pytest.approx(2**0.5, rel=0.15)
    assert worst["constant"] * 0.95 < worst["average 0.9"] < 1.15 * worst["constant"]
    assert worst["own"] < 0.1 * worst["constant"]
    # A count of 1,024 tokens with a chance of 1/4 spreads by sqrt(3 / 1,024) of its mean; the largest of eight is 1.4 of that.
    assert 1.2 < worst["constant"] / (3 / 1024) ** 0.5 < 1.6


def test_rows_of_their_own_taste_are_more_uneven_than_their_tokens_one_by_one() -> None:
    scores_YTE = scores(rows=2048, of_row=1.0)
    best = choice().evening(scores_YTE[0], torch.zeros(8)).unsqueeze(0)
    found = compare(choice(), scores_YTE, best, 1024, [])
    assert found["constant"]["worst"] > 2 * found["shuffled"]["worst"]


def test_a_model_is_read(small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MoEGPTForCausalLM(MoEGPTConfig.from_json_file(small_model)).save_pretrained(tmp_path / "hf")
    for file in (small_shards / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "hf")
    flags = ["--model", tmp_path / "hf", "--data", small_shards, "--sequence_length", 64]
    found = balance.run(parse(*flags, "--tokens", 4096, "--tokens_a_step", 512, 1024))
    assert [found[tokens]["steps"] for tokens in ("512", "1024")] == [8, 4]
    assert all(len(found["512"][rule]["layers"]) == 2 for rule in ("constant", "shuffled", "average 0", "average 0.5", "own"))
    assert 0 < found["512"]["own"]["worst"] < found["512"]["constant"]["worst"]
    for flag, value in (("sequence_length", "0"), ("averages", "1"), ("averages", "nan")):
        with pytest.raises(UserError, match=f"--{flag} must be at least .* got {value}"):
            balance.run(parse(*flags, f"--{flag}", value))
    for wrong in (100, 4096):
        said = f"--tokens_a_step {wrong} must be whole rows of 64, and two steps at least of --tokens 4096"
        with pytest.raises(UserError, match=said):
            balance.run(parse(*flags, "--tokens", 4096, "--tokens_a_step", wrong))


def parse(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    balance.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])
