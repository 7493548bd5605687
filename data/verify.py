"""Check every byte of shards against their manifest: `python data/verify.py shards/`.

Checksums, sizes, counts, the range of ids, one end-of-text token at the end of each document and nowhere else, the index's
offsets, and the tokenizer's fingerprint. Prints each fault on a line of its own; exit code 0 when there is none, else 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__" and not __package__:  # or a `data` on PYTHONPATH would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import LIMITS, Exit, UserError, hold_standard_streams, one_line, sentence
from data.files import hash_file, small_file
from data.flags import Parser, at_least_one
from data.shards import SPLITS, Index, check_shard, index_faults, load_manifest, read_index
from data.terminal import Progress, exit_code, leave, report, say, stdout
from data.tokens import tokenizer as tokenizers

CHUNK_TOKENS = 1 << 22


def verify(folder: Path, workers: int = 1, on_shard: Callable[[], None] = lambda: None) -> list[str]:
    """Every fault as a sentence that names the file; empty for a sound folder. Raises NotFound without a manifest."""
    manifest = load_manifest(folder)
    faults = list(_tokenizer_faults(folder, manifest))
    jobs = [(split, shard) for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    progress = Progress(sum(shard["bytes"] for _, shard in jobs), what="verify")
    done = 0
    # Threads are enough: hashing, numpy and reading release the interpreter lock.
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: _shard_faults(folder, job[0], job[1], manifest), jobs)
        for (_, shard), found in zip(jobs, results, strict=True):
            faults += found
            done += shard["bytes"]
            on_shard()
            progress.update(done, f"{len(faults)} faults" if faults else "")
    progress.close()
    for split in SPLITS:
        faults += _total_faults(folder, split, manifest["splits"][split])
    return faults


def _tokenizer_faults(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    path = folder / "tokenizer" / "tokenizer.json"
    try:
        found = tokenizers.fingerprint(small_file(path).decode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in LIMITS:
            raise
        yield f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        return
    if found != manifest["tokenizer"]["fingerprint"]:
        yield f"{path} is not the tokenizer these shards were made with (fingerprint {found[:12]})"


def _total_faults(folder: Path, split: str, entry: dict[str, Any]) -> Iterator[str]:
    for key in ("documents", "tokens", "text_bytes"):
        total = sum(shard[key] for shard in entry["shards"])
        if total != entry[key]:
            yield f"{folder / 'manifest.json'}: {split} has {entry[key]} {key}, its shards {total}"
    known = {f"{shard['name']}{suffix}" for shard in entry["shards"] for suffix in (".bin", ".idx")}
    for path in sorted((folder / split).glob("*")):
        if path.name not in known:
            yield f"{path} is not in the manifest"


def _shard_faults(folder: Path, split: str, shard: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    stem = folder / split / shard["name"]
    try:
        check_shard(folder, split, shard, manifest["dtype"])
        index = read_index(stem.with_suffix(".idx"))
        return [
            *_checksum_faults(stem, shard),
            *index_faults(stem.with_suffix(".idx"), index, shard["tokens"]),
            *_token_faults(stem, index, manifest),
        ]
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in LIMITS:
            raise
        return [sentence(error)]


def _checksum_faults(stem: Path, shard: dict[str, Any]) -> Iterator[str]:
    for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256")):
        path = stem.with_suffix(suffix)
        if hash_file(path) != shard[key]:
            yield f"{path} has another sha256 than the manifest says"


def _token_faults(stem: Path, index: Index, manifest: dict[str, Any]) -> Iterator[str]:
    path = stem.with_suffix(".bin")
    vocab_size, end = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["eos_token_id"]
    tokens = np.memmap(path, np.dtype(index.dtype).newbyteorder("<"), "r")
    last = np.cumsum(index.sizes, dtype=np.int64) - 1
    if len(last) and last[-1] == len(tokens) - 1:
        open_ends = np.flatnonzero(tokens[last] != end)
        if len(open_ends):
            yield f"{path}: document {int(open_ends[0])} does not end with the end-of-text token ({len(open_ends)} such documents)"
    ends = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        ends += int((chunk == end).sum())
        wrong = (chunk >= vocab_size) | (chunk < 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            yield f"{path}: token {start + at} is {int(chunk[at])}, the vocabulary has {vocab_size}"
            return
    if ends != len(last):
        yield f"{path}: {ends} end-of-text tokens in {len(last)} documents"


def main(arguments: list[str]) -> int:
    hold_standard_streams()
    p = Parser(
        prog="python data/verify.py",
        description="Check every byte of shards against their manifest.",
        examples="python data/verify.py shards/\npython data/verify.py code/ text/ --workers 4",
    )
    p.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders that data/preprocess.py wrote")
    p.add_argument("--workers", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="number of threads")
    args = p.parse_args(arguments)
    at_least_one(args, "workers")
    codes: set[int] = set()
    for folder in args.folders:
        started = time.monotonic()
        try:
            faults = verify(folder, args.workers)
        except (UserError, OSError) as error:  # one that is not there says nothing of the others
            codes.add(report(error))
            continue
        for fault in faults:
            say(f"error: {one_line(fault)}")
        if faults:
            codes.add(Exit.FAULT)
            continue
        splits = load_manifest(folder)["splits"]
        shards, tokens = (sum(f(splits[s]) for s in SPLITS) for f in (lambda e: len(e["shards"]), lambda e: e["tokens"]))
        say(f"{folder}: {shards} shards, {tokens:,} tokens, all sound ({time.monotonic() - started:.1f} s)", stdout)
    return Exit.FAULT if Exit.FAULT in codes else max(codes, default=Exit.DONE)


if __name__ == "__main__":
    leave(exit_code(lambda: main(sys.argv[1:])))
