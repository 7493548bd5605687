"""Text to verified shards against the usual way, end to end on the same files: `python launch/benchmark.py preprocess`.

The usual way is Megatron-LM's tools/preprocess_data.py: one reader of gzipped JSON Lines, a multiprocessing.Pool in which each
worker parses one line with `json` and encodes it with HF tokenizers, and one writer of the same file format.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.flags import at_least_one
from launch.cli import CLONE

_tokenizer: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", type=Path, help=".json.gz files; default: the standard library, packed")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder; default: train one of 4,096 tokens")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, for both sides")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same files; their tokens are compared one by one."""
    at_least_one(args, "workers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = sorted(args.input or pack_stdlib(folder / "corpus"))
        tokenizer = args.tokenizer or train_tokenizer(folder)
        ours, preprocess_s, verify_s = our_way(files, tokenizer, folder / "ours", args.workers)
        theirs, usual_s = usual_way(files, tokenizer, folder / "usual", args.workers)
        assert np.array_equal(ours[0], theirs[0]), "documents of different lengths"
        assert np.array_equal(ours[1], theirs[1]), "different ids"
    tokens, documents, ours_s = len(ours[1]), len(ours[0]), preprocess_s + verify_s
    result = {
        "documents": documents,
        "tokens": tokens,
        "ours_seconds": ours_s,
        "verify_seconds": verify_s,
        "usual_seconds": usual_s,
        "ours_tokens_per_second": tokens / ours_s,
        "usual_tokens_per_second": tokens / usual_s,
        "ratio": usual_s / ours_s,
    }
    print(f"{documents:,} documents, {tokens:,} tokens, {args.workers} processes; ids identical on every document")
    print(f"{'':32}{'seconds':>10}{'tokens/s':>16}")
    for name, seconds in (("ours, verified", ours_s), ("usual way (Pool of tokenizers)", usual_s)):
        print(f"{name:32}{seconds:>10.1f}{tokens / seconds:>16,.0f}")
    print(f"{'ratio':32}{result['ratio']:>9.1f}x   (of ours, {verify_s:.1f} s are verify.py)")
    return result


def our_way(files: list[Path], tokenizer: str, output: Path, workers: int) -> tuple[tuple[np.ndarray, np.ndarray], float, float]:
    """((sizes, tokens), seconds of preprocess.py, seconds of verify.py), both as commands from interpreter start to end."""
    job = ["data/preprocess.py", "--input", *map(str, files), "--tokenizer", tokenizer, "--output", str(output)]
    # All documents in one split and none removed, so that the two outputs can be compared.
    job += ["--validation_fraction", "0", "--dedup", "none", "--workers", str(workers)]
    times = []
    for command in (job, ["data/verify.py", str(output)]):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=CLONE, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return read_shards(output / "train"), times[0], times[1]


def read_shards(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    from data.shards import read_index

    indexes = [read_index(path) for path in sorted(folder.glob("*.idx"))]
    tokens = [np.fromfile(path, i.dtype) for path, i in zip(sorted(folder.glob("*.bin")), indexes, strict=True)]
    return np.concatenate([i.sizes for i in indexes]), np.concatenate(tokens)


def usual_way(files: list[Path], tokenizer: str, stem: Path, workers: int) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """((sizes, tokens), seconds) of the usual way; the time of starting an interpreter is given to it."""
    from data.shards import index_bytes

    started = time.perf_counter()
    sizes = []
    with multiprocessing.get_context("fork").Pool(workers, _load, (tokenizer,)) as pool, open(f"{stem}.bin", "wb") as file:
        for ids in pool.imap(_encode, _lines(files), chunksize=32):
            file.write(np.array(ids, np.uint16).tobytes())
            sizes.append(len(ids))
    Path(f"{stem}.idx").write_bytes(index_bytes(np.array(sizes, np.int32), "uint16"))
    seconds = time.perf_counter() - started
    return (np.array(sizes), np.fromfile(f"{stem}.bin", np.uint16)), seconds


def _lines(files: list[Path]) -> Iterator[str]:
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file


def _load(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    path = Path(tokenizer)
    _tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    _tokenizer.encode_special_tokens = True
    assert _tokenizer.token_to_id("<|endoftext|>") == 0


def _encode(line: str) -> list[int]:
    return [*_tokenizer.encode(json.loads(line)["content"], add_special_tokens=False).ids, 0]


def pack_stdlib(folder: Path) -> list[Path]:
    """The standard library as four files of gzipped JSON Lines."""
    from data.sources.discover import find_sources

    (source,) = find_sources(["stdlib"])
    folder.mkdir()
    texts = [Path(source.name, name).read_bytes().decode("utf-8", "replace") for name in source.files]
    rows = [json.dumps({"content": text}) + "\n" for text in texts if text.strip() and len(text.encode()) < 1_000_000]
    for number in range(4):
        with gzip.open(folder / f"file-{number}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(rows[number::4])
    return sorted(folder.iterdir())


def train_tokenizer(folder: Path) -> str:
    command = ["data/preprocess.py", "--input", "stdlib", "--train_tokenizer", "4096", "--output", str(folder / "tokenizer")]
    subprocess.run([sys.executable, *command], cwd=CLONE, check=True, stdout=subprocess.DEVNULL)
    return str(folder / "tokenizer" / "tokenizer")
