"""Packed samples against HF datasets on the same tokens, and opening 100 B tokens: `python launch/benchmark.py data`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.flags import at_least_one

BATCH, LENGTH = 16, 2048
SHARDS, SHARD_TOKENS, SHARD_DOCUMENTS = 1000, 100_000_000, 83_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=Path, help="a folder that data/preprocess.py wrote; default: 30 M random tokens")
    parser.add_argument("--batches", type=int, default=600, help=f"how many batches of {BATCH} samples of {LENGTH} tokens to time")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions; the best one counts, for both sides")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides in this process on one thread, then the opening of a large set in a process of its own."""
    import torch

    at_least_one(args, "batches", "repeats")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        shards = args.shards or make_shards(Path(temporary, "random"), 1, 30_000_000, sparse=False)
        result = compare(shards, Path(temporary, "arrow"), args.batches, args.repeats)
        large = make_shards(Path(temporary, "large"), SHARDS, SHARD_TOKENS, sparse=True)
        command = [sys.executable, "-P", "-c", f"from launch.benchmarks.data import open_large; open_large({str(large)!r})"]
        result |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{'random packed samples, one core':44}{'tokens/s':>16}{'ours is':>9}")
    for name in ("ours", "ours_document_mask", "datasets_shuffled", "datasets_rows_given"):
        ratio = f"{result['ratio_' + name]:>8.1f}x" if f"ratio_{name}" in result else ""
        print(f"{name.replace('_', ' '):44}{result[name + '_tokens_per_second']:>16,.0f}{ratio}")
    print(f"{'opening 100 B tokens in 1,000 shards, first batch':50}{result['open_seconds']:>8.2f} s")
    print(f"{'... memory for it':50}{result['open_mb']:>6.0f} MB (Python and torch alone: {result['torch_mb']:.0f} MB)")
    return result


def compare(shards: Path, arrow: Path, batches: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of each side. The sides take turns, so that a busy machine is busy for all of them."""
    from data.dataset import PackedDataset

    ours = PackedDataset([shards], split="train", sequence_length=LENGTH)
    masked = PackedDataset([shards], split="train", sequence_length=LENGTH, document_mask=True)
    rows = as_datasets(ours, arrow)
    theirs, shuffled = rows.with_format("torch"), rows.shuffle(seed=0).with_format("torch")
    # The n-th batch of an epoch. Ours is in random order by itself; of theirs once by its own shuffle, once by rows handed to it.
    numbers = [np.arange(n * BATCH, (n + 1) * BATCH) % len(ours) for n in range(batches)]
    given = [ours.locate(n)[1].tolist() for n in numbers]
    assert (theirs[given[0]]["tokens"][:, :-1] == ours.batch(numbers[0])["input_ids"]).all(), "not the same tokens"
    sides: dict[str, Callable[[int], object]] = {
        "ours": lambda n: ours.batch(numbers[n]),
        "ours_document_mask": lambda n: masked.batch(numbers[n]),
        "datasets_shuffled": lambda n: targets(shuffled[numbers[n][0] : numbers[n][-1] + 1]["tokens"]),
        "datasets_rows_given": lambda n: targets(theirs[given[n]]["tokens"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, read in sides.items():
            seconds[name].append(timed(read, batches))
    # The first pass warms the page cache.
    rates = {name: batches * BATCH * LENGTH / min(times[1:]) for name, times in seconds.items()}
    result: dict[str, Any] = {f"{name}_tokens_per_second": rate for name, rate in rates.items()}
    return result | {f"ratio_{name}": rates["ours"] / rates[name] for name in rates if name.startswith("datasets")}


def targets(tokens: Any) -> tuple[Any, Any]:
    """What a training step needs of a row of LENGTH + 1 tokens: int64 inputs and targets."""
    assert tokens.shape == (BATCH, LENGTH + 1) and not tokens.is_floating_point() and tokens.element_size() == 8
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(read: Callable[[int], object], batches: int) -> float:
    started = time.perf_counter()
    for n in range(batches):
        read(n)
    return time.perf_counter() - started


def as_datasets(ours: Any, folder: Path) -> Any:
    """The same samples as rows of an Arrow file, memory-mapped by HF datasets, ids in the shards' dtype."""
    import datasets

    datasets.disable_progress_bars()
    stream = ours.streams[0]

    def rows() -> Any:
        for i in range(len(ours)):
            tokens = np.empty(LENGTH + 1, np.int64)
            stream.read(i * LENGTH, tokens)
            yield {"tokens": tokens}

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value(stream.dtype), length=LENGTH + 1)})
    cache = str(folder.with_name("cache"))
    datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def make_shards(folder: Path, count: int, tokens: int, sparse: bool) -> Path:
    """A folder with a manifest and `count` train shards of `tokens` tokens; sparse ones have headers and sizes, no content."""
    from data.files import replace_json
    from data.shards import DTYPE_CODES, HEADER, MAGIC, MANIFEST, index_bytes, index_file_size, shard_name

    documents = SHARD_DOCUMENTS if sparse else 1000
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    entries = []
    for number in range(count):
        stem = folder / "train" / shard_name(number)
        with open(stem.with_suffix(".bin"), "wb") as file:
            if not sparse:
                file.write(np.random.default_rng(number).integers(1, 49152, tokens, np.uint16).tobytes())
            file.truncate(2 * tokens)
        with open(stem.with_suffix(".idx"), "wb") as file:
            if sparse:
                file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES["uint16"], documents, documents + 1))
                file.truncate(index_file_size(documents))
            else:
                file.write(index_bytes(np.full(documents, tokens // documents), "uint16"))
        entry: dict[str, Any] = {
            "name": stem.name,
            "documents": documents,
            "tokens": tokens,
            "text_bytes": 3 * tokens,
            "bytes": 2 * tokens,
        }
        entries.append(entry | {"sha256": str(number), "index_sha256": ""})
    totals = {key: sum(e[key] for e in entries) for key in ("documents", "tokens", "text_bytes")}
    empty = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    manifest = {
        "format": "moe-code-gpt-shards",
        "version": 1,
        "dtype": "uint16",
        "arguments": {},
        "tokenizer": {"name": "made up", "fingerprint": "made up", "vocab_size": 49152, "eos_token_id": 0},
        "splits": {"train": totals | {"shards": entries}, "validation": empty},
    }
    replace_json(folder / MANIFEST, manifest)
    return folder


def open_large(folder: str) -> None:
    """Open, read one random batch; print seconds, the memory it took, and what Python and torch had taken before, as JSON."""
    from data.dataset import PackedDataset

    before, started = peak_mb(), time.perf_counter()
    shards = PackedDataset([folder], split="train", sequence_length=LENGTH)
    shards.batch(range(BATCH))
    seconds = time.perf_counter() - started
    assert len(shards) > 48_000_000
    print(json.dumps({"open_seconds": seconds, "open_mb": peak_mb() - before, "torch_mb": before}))


def peak_mb() -> float:
    """The most memory that this process ever had resident. Not getrusage: a child inherits its parent's figure there."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
