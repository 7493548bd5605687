"""Shards and an unfinished job of the version before the rooms (commit 7530553) are read, gone on with and trained on as they are.

tests/fixtures/shards_before_rooms/ was written by that version: `finished` by its command, `unfinished` by the same command with
blocks of 600 bytes, stopped at its 61st fsync. Input of 43 rows, made by a random generator.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import contents
from support import ROOT

from data.dataset import PackedDataset
from data.verify import verify

OLD = ROOT / "tests" / "fixtures" / "shards_before_rooms"
FLAGS = ["--input", "input.jsonl", "--shard_tokens", 700, "--validation_fraction", 0.2, "--fim_rate", 0.3, "--train_tokenizer", 280]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("split", "samples", "sha256"),
    [
        ("train", 127, "02ae2a31031b1db37013e52d15f7a62a2bb8bcf15b9e18a12c2ca7351bb46c4c"),
        ("validation", 18, "6a0ba120431a0bfd05eea0e4422ec53c5c103422c977ffd5707a62f4734a294f"),
    ],
)
def test_every_sample_is_what_that_version_read(split: str, samples: int, sha256: str) -> None:
    """The digests were taken by that version's own PackedDataset."""
    data = PackedDataset([OLD / "finished"], split=split, sequence_length=16, seed=3, document_mask=True)
    batch, digest = data.batch(np.arange(len(data))), hashlib.sha256()
    for key in sorted(batch):
        digest.update(key.encode() + batch[key].numpy().astype("<i8").tobytes())
    assert (len(data), digest.hexdigest()) == (samples, sha256)


def test_a_run_on_them_goes_on_because_the_fingerprint_is_the_same() -> None:
    data = PackedDataset([OLD / "finished"], split="train", sequence_length=16, seed=3)
    assert data.fingerprint == "ea79171cdc5f26525fe3c4b6c5a9b2ac9c66f11bc189d885406cd09259d1f6c1"


def test_a_model_trains_on_them() -> None:
    import torch

    from model import MoEGPTConfig, MoEGPTForCausalLM

    data = PackedDataset([OLD / "finished"], split="train", sequence_length=16)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", vocab_size=data.vocab_size, **small))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**data.batch(np.arange(8))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_they_verify() -> None:
    assert verify(OLD / "finished") == []


def test_the_finished_job_is_left_alone(old: Path, preprocess: Callable[..., tuple[int, str, str]]) -> None:
    before = contents(old)
    code, out, err = preprocess(*FLAGS, "--output", "finished")
    assert code == 0 and "complete" in out, err
    assert contents(old) == before


def assert_same_shards(made: Path, before: Path) -> None:
    """To the byte, but for the padding that the tokenizer's configuration did not name."""
    for part in ("train", "validation"):
        assert contents(made / part) == contents(before / part)
    tokenizers = [contents(folder / "tokenizer") for folder in (made, before)]
    ours, theirs = (json.loads(files.pop("tokenizer_config.json")) for files in tokenizers)
    assert tokenizers[0] == tokenizers[1] and ours == theirs | {"pad_token": "<fim_pad>", "padding_side": "left"}


def test_the_unfinished_job_goes_on_to_the_same_shards(old: Path, preprocess: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = preprocess(*FLAGS, "--output", "unfinished")
    assert code == 0, err
    assert_same_shards(old / "unfinished", old / "finished")


def test_preprocessing_gives_those_bytes_today(old: Path, preprocess: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = preprocess(*FLAGS, "--output", "today")
    assert code == 0, err
    assert_same_shards(old / "today", old / "finished")
