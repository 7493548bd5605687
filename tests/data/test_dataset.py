"""Samples are what the documents say, in an order that only depends on (seed, index); blends, masks, and 100 B tokens."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import environment, read_documents
from support import ROOT

from data.cli import UserError
from data.dataset import LOCATED_AT_ONCE, PackedDataset
from data.pipeline.writer import SplitWriter
from data.shards import SPLITS

FACTS = {"name": "t", "fingerprint": "f", "vocab_size": 5000, "eos_token_id": 0}


def make(
    folder: Path,
    documents: list[list[int]],
    *,
    shard_tokens: int = 50,
    fingerprint: str = "f",
    text_bytes: int = 3,
    dtype: str = "uint16",
) -> Path:
    """A complete folder of given documents, the same in both splits."""
    folder.mkdir()
    splits = {}
    for split in SPLITS:
        writer = SplitWriter(folder / split, dtype, shard_tokens)
        sizes = np.array([len(d) for d in documents], np.int32)
        writer.add(np.concatenate([np.array(d, dtype) for d in documents]), sizes, np.full(len(sizes), text_bytes))
        writer.close_shard()
        splits[split] = writer.summary()
    manifest = {"format": "moe-code-gpt-shards", "version": 1, "dtype": dtype, "arguments": {}, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": FACTS | {"fingerprint": fingerprint}}))
    return folder


def random_documents(seed: int, count: int = 60, low: int = 1) -> list[list[int]]:
    """Ids from `low` on, so that folders can be told apart; each document ends with 0."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(low, low + 900, rng.integers(0, 40)).tolist(), 0] for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "a", random_documents(0))


@pytest.fixture
def stream(folder: Path) -> list[int]:
    return [token for document in read_documents(folder) for token in document]


def test_a_sample_is_a_piece_of_the_stream_and_its_next_tokens(folder: Path, stream: list[int]) -> None:
    data = PackedDataset([folder], split="validation", sequence_length=16)
    assert len(data) == (len(stream) - 1) // 16 and len(data.streams[0].shards) > 10
    for i in range(len(data)):
        assert data[i]["input_ids"].tolist() == stream[16 * i : 16 * i + 16]
        assert data[i]["shift_labels"].tolist() == stream[16 * i + 1 : 16 * i + 17]
    # The property would be empty if no sample straddled shards.
    starts = data.streams[0].starts[1:-1]
    assert ((starts - 1) // 16 == starts // 16).sum() > 3


@pytest.mark.parametrize("length", [1, 7, 16, 50, 200])
def test_an_epoch_reads_each_sample_once_in_another_order(folder: Path, stream: list[int], length: int) -> None:
    data = PackedDataset([folder], split="train", sequence_length=length, seed=3)
    n = len(data)
    whole = [stream[length * i : length * (i + 1)] for i in range(n)]
    epochs = [data.batch(range(e * n, (e + 1) * n))["input_ids"].tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(whole)
    if n > 10:
        assert epochs[0] != epochs[1] and epochs[0] != whole
        other = PackedDataset([folder], split="train", sequence_length=length, seed=4)
        assert other.batch(range(n))["input_ids"].tolist() != epochs[0]


def test_tensors_are_contiguous_int64(folder: Path) -> None:
    batch = PackedDataset([folder], split="train", sequence_length=16, document_mask=True).batch([3, 1, 700])
    assert set(batch) == {"input_ids", "shift_labels", "position_ids"}
    for tensor in batch.values():
        assert tensor.dtype == torch.int64 and tensor.shape == (3, 16) and tensor.is_contiguous()


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_places_that_are_kept_are_those_that_are_computed(folder: Path, weights: tuple[float, float] | None) -> None:
    """Forwards, backwards and across the edges of what is computed at once."""
    sources = [folder] if weights is None else [(folder, weight) for weight in weights]
    data = PackedDataset(sources, split="train", sequence_length=16)
    edge = 2 * LOCATED_AT_ONCE
    for first in (0, edge - 3, edge, 5, edge - 1, 7 * edge):
        numbers = np.arange(first, first + 9)
        assert all(np.array_equal(*pair) for pair in zip(data.locate(numbers), data._locate(numbers), strict=True))


@pytest.mark.parametrize("mask", [False, True])
def test_a_batch_is_its_samples_whoever_reads_them(folder: Path, mask: bool) -> None:
    """One rank's batch of 24 equals what 2, 3 or 4 ranks read of it, from any number of samples on: a position is one integer."""
    data = PackedDataset([folder], split="train", sequence_length=16, document_mask=mask)
    consumed = 37
    whole = data.batch(range(consumed, consumed + 24))
    for ranks in (2, 3, 4):
        again = PackedDataset([folder], split="train", sequence_length=16, document_mask=mask)
        parts = [again.batch(range(consumed + rank, consumed + 24, ranks)) for rank in range(ranks)]
        for key, tensor in whole.items():
            assert all(torch.equal(tensor[rank::ranks], parts[rank][key]) for rank in range(ranks))
    assert all(torch.equal(whole[key][5], data[consumed + 5][key]) for key in whole)


def slow_mask(documents: list[list[int]], start: int, length: int) -> tuple[list[int], list[int]]:
    """(positions, targets) of tokens [start, start + length), token by token from the documents."""
    numbered = [(d, i, token) for d, document in enumerate(documents) for i, token in enumerate(document)]
    here, following = numbered[start : start + length], numbered[start + 1 : start + length + 1]
    positions = [k - min(j for j, other in enumerate(here) if other[0] == entry[0]) for k, entry in enumerate(here)]
    targets = [after[2] if after[0] == entry[0] else -100 for entry, after in zip(here, following, strict=True)]
    return positions, targets


@pytest.mark.parametrize("length", [5, 16, 120])
def test_document_mask(folder: Path, length: int) -> None:
    documents = read_documents(folder, "validation")
    data = PackedDataset([folder], split="validation", sequence_length=length, document_mask=True)
    crossings = at_the_edge = 0
    for i in range(len(data)):
        positions, targets = slow_mask(documents, i * length, length)
        assert data[i]["position_ids"].tolist() == positions and data[i]["shift_labels"].tolist() == targets
        assert data.count_targets([i]) == length - targets.count(-100)
        crossings += targets.count(-100)
        at_the_edge += targets[-1] == -100
        # The end-of-text token itself is learned: it is a target wherever its document has a token before it.
        inputs = data[i]["input_ids"].tolist()
        assert all(targets[k] == 0 for k in range(length - 1) if inputs[k + 1] == 0 and targets[k] != -100)
    assert crossings > 10 and (at_the_edge > 0 or length > 100)


def test_blend_counts_are_exact_and_each_folder_goes_round(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", random_documents(1)), make(tmp_path / "b", random_documents(2, 20, low=2000))
    data = PackedDataset([(a, 0.7), (b, 0.3)], split="train", sequence_length=8)
    sizes = [len(PackedDataset([f], split="train", sequence_length=8)) for f in (a, b)]
    assert len(data) == min(int(sizes[0] / 0.7), int(sizes[1] / 0.3))
    source, sample = data.locate(np.arange(5000))
    for upto in (10, 100, 730, 5000):
        assert (source[:upto] == 0).sum() == upto * 7 // 10
    for k, n in enumerate(sizes):
        mine = sample[source == k]
        assert len(mine) > 2 * n
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    rows = data.batch(range(40))["input_ids"]
    of_b = ((rows >= 2000) | (rows == 0)).all(1) & (rows > 0).any(1)
    assert torch.equal(of_b, torch.from_numpy(source[:40] == 1))


def test_folders_without_weights_are_one_corpus(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", random_documents(1)), make(tmp_path / "b", random_documents(2, 20, low=2000))
    single = [PackedDataset([f], split="train", sequence_length=8) for f in (a, b)]
    data = PackedDataset([a, str(b)], split="train", sequence_length=8)
    assert len(data) == sum(map(len, single))
    assert data.text_bytes_per_token() == pytest.approx(3 * (60 + 20) / sum(s.streams[0].tokens for s in single))
    rows = sorted(data.batch(range(len(data)))["input_ids"].tolist())
    assert rows == sorted(row for s in single for row in s.batch(range(len(s)))["input_ids"].tolist())


def test_folders_of_which_nothing_is_read_are_known(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", random_documents(1)), make(tmp_path / "b", [[1, 2, 0]])
    data = PackedDataset([a, b], split="train", sequence_length=8)
    assert [stream.folder for stream in data.too_short] == [b]
    assert not PackedDataset([a], split="train", sequence_length=8).too_short
    with pytest.raises(UserError, match=r"the train split of .*b has 3 tokens, a sample of 8 needs 9"):
        PackedDataset([(a, 0.9), (b, 0.1)], split="train", sequence_length=8)  # its share could not be read


def test_validation_is_always_the_same(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", random_documents(1)), make(tmp_path / "b", random_documents(2))
    one = PackedDataset([(a, 0.9), (b, 0.1)], split="validation", sequence_length=8, seed=1)
    two = PackedDataset([a, b], split="validation", sequence_length=8, seed=2)
    assert len(one) == len(two) and torch.equal(one.batch(range(len(one)))["input_ids"], two.batch(range(len(two)))["input_ids"])
    with pytest.raises(IndexError):
        one[len(one)]


@pytest.mark.parametrize("split", SPLITS)
def test_no_sample_comes_before_the_first(split: str, folder: Path) -> None:
    """numpy would count from the end: of a batch one row alone would be another sample."""
    data = PackedDataset([folder], split=split, sequence_length=8)
    with pytest.raises(IndexError, match="sample numbers start at 0"):
        data.batch([3, -1])


def test_the_first_validation_samples_stand_for_every_folder(tmp_path: Path) -> None:
    """They were all of the first folder, and their loss was divided by the bytes a token of all."""
    a, b = make(tmp_path / "a", random_documents(1, 300)), make(tmp_path / "b", random_documents(2, 100), text_bytes=12)
    data = PackedDataset([a, b], split="validation", sequence_length=8)
    of_a, of_b = (PackedDataset([f], split="validation", sequence_length=8) for f in (a, b))
    source, sample = data.locate(np.arange(len(data)))
    for folder, alone in enumerate((of_a, of_b)):  # each folder in its order, whole
        assert sample[source == folder].tolist() == list(range(len(alone)))
        for first in (10, 40, len(data)):
            assert abs((source[:first] == folder).sum() - first * len(alone) / len(data)) < 1
    judged = 40
    shares = [(source[:judged] == folder).mean() for folder in (0, 1)]
    assert 0.1 < shares[1] < 0.5
    expected = shares[0] * of_a.text_bytes_per_token() + shares[1] * of_b.text_bytes_per_token()
    assert data.text_bytes_per_token(judged) == pytest.approx(expected)
    assert of_a.text_bytes_per_token(judged) == of_a.text_bytes_per_token()


def test_facts_for_training(folder: Path, stream: list[int], tmp_path: Path) -> None:
    data = PackedDataset([folder], split="train", sequence_length=16)
    assert (data.vocab_size, data.eos_token_id, data.tokenizer_fingerprint) == (5000, 0, "f")
    assert data.tokenizer_folder == folder / "tokenizer" and data.tokens == 16 * len(data)
    assert math.isclose(data.text_bytes_per_token(), 3 * 60 / len(stream))
    json.dumps(data.describe())
    same = PackedDataset([folder], split="train", sequence_length=16, seed=9)
    other = PackedDataset([make(tmp_path / "b", random_documents(7))], split="train", sequence_length=16)
    assert data.fingerprint == same.fingerprint != other.fingerprint


def test_whatever_decides_a_sample_is_in_the_fingerprint(tmp_path: Path) -> None:
    """A run that goes on compares nothing else of its data: folders, their order, their weights, the length, the tokenizer."""
    a, b = make(tmp_path / "a", random_documents(1)), make(tmp_path / "b", random_documents(2))
    sources: list[list[Any]] = [[a], [a, b], [b, a], [(a, 0.5), (b, 0.5)], [(a, 0.4), (b, 0.6)], [(b, 0.4), (a, 0.6)]]
    found = [PackedDataset(given, split="train", sequence_length=16).fingerprint for given in sources]
    found.append(PackedDataset([a], split="train", sequence_length=8).fingerprint)
    found.append(
        PackedDataset([make(tmp_path / "c", random_documents(1), fingerprint="g")], split="train", sequence_length=16).fingerprint
    )
    assert len(set(found)) == len(found)


def test_a_blend_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Golden values, as of the order of one folder: of the same number of samples two folders have orders of their own."""
    folders = [make(tmp_path / name, random_documents(1)) for name in "ab"]
    data = PackedDataset([(folder, 0.5) for folder in folders], split="train", sequence_length=100, seed=7)
    source, sample = data.locate(np.arange(2 * len(data), 2 * len(data) + 12))
    assert source.tolist() == [0, 1] * 6
    assert (sample[::2].tolist(), sample[1::2].tolist()) == ([7, 1, 2, 8, 0, 4], [10, 3, 2, 0, 1, 11])


def test_mistakes_are_sentences(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "b", random_documents(1), fingerprint="g")
    corpus = tmp_path / "0.json.gz"
    corpus.touch()
    for sources, message in [
        ([folder, other], "same tokenizer"),
        ([(folder, 1.0), tmp_path / "b"], "every shard folder a weight"),
        *[([(folder, 1.0), (folder, weight)], "weights must be from 0.001") for weight in (-1.0, 0.0009, 1e6, math.inf, math.nan)],
        ([tmp_path / "nowhere"], "no shards at"),
        ([corpus], rf"^{re.escape(str(corpus))} is a file, not a folder of shards; .* --input {re.escape(str(corpus))} --output"),
        ([], "no shards given"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            PackedDataset(sources, split="train", sequence_length=16)
    third = make(tmp_path / "c", random_documents(2))
    assert len(PackedDataset([folder, third], split="train", sequence_length=16).streams) == 2
    path = third / "manifest.json"
    path.write_text(path.read_text().replace('"eos_token_id": 0', '"eos_token_id": 4'))
    with pytest.raises(ValueError, match=r"documents end with token 4 in .*c and with 0 in .*a: preprocess one of them again"):
        PackedDataset([folder, third], split="train", sequence_length=16)
    with pytest.raises(ValueError, match="a sample of 100000 needs 100001"):
        PackedDataset([folder], split="train", sequence_length=100_000)


def test_more_shards_than_file_handles(tmp_path: Path) -> None:
    """300 shards with 256 handles: maps are closed again, and no sample suffers."""
    folder = make(tmp_path / "many", random_documents(5, 300, low=1), shard_tokens=1)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from data.dataset import LOCATED_AT_ONCE, PackedDataset\n"
        f"data = PackedDataset([{str(folder)!r}], split='train', sequence_length=4, document_mask=True)\n"
        "assert len(data.streams[0].shards) == 300\n"
        "print(int(data.batch(range(len(data)))['input_ids'].sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
    stream = [token for document in read_documents(folder) for token in document]
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(stream[: (len(stream) - 1) // 4 * 4])


def test_a_hundred_billion_tokens_open_without_a_scan(tmp_path: Path) -> None:
    """1,000 sparse shards of 100 M tokens, in a process of its own; `benchmark.py data` measures the seconds. What Python and
    torch themselves take is not counted: torch's CUDA build has 500 MB resident once it is imported, its CPU build 180."""
    from launch.benchmarks.data import SHARD_TOKENS, SHARDS, make_shards

    folder = make_shards(tmp_path / "large", SHARDS, SHARD_TOKENS, sparse=True)
    script = f"from launch.benchmarks.data import open_large; open_large({str(folder)!r})"
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), check=True)
    opened = json.loads(done.stdout)
    assert opened["open_mb"] < 50  # an index of the samples alone would be 390 MB
    assert opened["open_seconds"] < 20  # a scan of the 200 GB would take longer; on an idle core it is 0.05


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 5000), ("int32", 5000), ("int32", -1), ("int32", -(2**31))])
def test_a_token_outside_the_vocabulary_is_refused_by_its_folder(dtype: str, token: int, tmp_path: Path) -> None:
    """It was an IndexError in the embedding, and on a GPU would be a device-side assert."""
    documents = random_documents(3)
    documents[20][0] = token
    folder = make(tmp_path / "wrong", documents, dtype=dtype)
    right = make(tmp_path / "right", random_documents(4), dtype=dtype)
    data = PackedDataset([right, folder], split="train", sequence_length=16)
    with pytest.raises(UserError, match=f"{folder} holds a token {token}, the vocabulary has 5000: it is damaged"):
        for number in range(len(data)):
            data.batch([number])


@pytest.mark.parametrize(
    "offsets",
    [lambda o: o // 2, lambda o: o + 10**12, lambda o: -o, lambda o: o[::-1]],
    ids=["overlap", "past", "negative", "order"],
)
def test_an_index_that_lies_makes_no_masks(tmp_path: Path, offsets: Callable[[np.ndarray], np.ndarray]) -> None:
    """At its right size and with its right header: only the masks that are read by it would be wrong."""
    folder = make(tmp_path / "a", random_documents(5), shard_tokens=10**6)
    (path,) = (folder / "train").glob("*.idx")
    content, count = bytearray(path.read_bytes()), len(random_documents(5))
    place = slice(34 + 4 * count, 34 + 12 * count)
    content[place] = offsets(np.frombuffer(bytes(content[place]), "<i8")).astype("<i8").tobytes()
    path.write_bytes(content)
    PackedDataset([folder], split="train", sequence_length=16).batch([0])  # which needs no index
    with pytest.raises(UserError, match=r"idx: offsets that are not the sums of the sizes before them; it is damaged"):
        PackedDataset([folder], split="train", sequence_length=16, document_mask=True).batch([0])
