"""The command line of preprocessing as one frozen object. Light: `--help` and a wrong flag need no numpy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.flags import Parser, as_dataclass, at_least_one

EXAMPLES = """
python data/preprocess.py --input 'corpus/*.json.gz' --tokenizer bigcode/starcoder2-15b --output shards/
python data/preprocess.py --input tree:src/ --train_tokenizer 4096 --output shards/ --dedup near --filter codeparrot
mpiexec -n 32 python data/preprocess.py --input 'corpus/*.parquet' --tokenizer tokenizer.json --output shards/
"""
#: Where the output lies, who does the work and what a fault does to the job has no influence on the bytes of a finished folder.
NOT_IDENTITY = ("output", "workers", "on_error")
#: A number beyond these is a slip of the hand, and some would overflow.
MAX_NUMBER, MAX_WORKERS = 2**63 - 1, 4096
#: 256 bytes and five special tokens; what the largest vocabularies have four times over.
MIN_VOCABULARY, MAX_VOCABULARY = 261, 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments:
    """Every flag of `data/preprocess.py`, checked. Raises UserError that names the flag, the value and what would be right."""

    input: tuple[str, ...]
    output: Path
    suffixes: tuple[str, ...] = (".py",)
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    text_field: str = "content"
    split: str = "train"
    validation_fraction: float = 0.005
    workers: int = 1
    shard_tokens: int = 100_000_000
    on_error: str = "skip"
    max_document_bytes: int = 1_000_000
    encoder: str = "auto"
    dedup: str = "exact"
    filter: str = "none"
    licenses: tuple[str, ...] | None = None
    license_field: str = "license"
    decontaminate: tuple[str, ...] = ()
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_validation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "workers", "shard_tokens", "max_document_bytes")
        for name, most in (("workers", MAX_WORKERS), ("shard_tokens", MAX_NUMBER), ("max_document_bytes", MAX_NUMBER)):
            if getattr(self, name) > most:
                raise UserError(f"--{name} must be at most {most}, not {getattr(self, name)}")
        if self.train_tokenizer is not None and not MIN_VOCABULARY <= self.train_tokenizer <= MAX_VOCABULARY:
            least = f"at least {MIN_VOCABULARY} (bytes and special tokens)"
            raise UserError(f"--train_tokenizer must be {least} and at most {MAX_VOCABULARY}, not {self.train_tokenizer}")
        for name in ("validation_fraction", "fim_rate", "fim_spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must be from 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.seed <= MAX_NUMBER:
            raise UserError(f"--seed must be from 0 to {MAX_NUMBER}, not {self.seed}")
        for name in ("input", "tokenizer", "text_field", "split", "license_field", "licenses", "decontaminate"):
            if "" in (value if isinstance(value := getattr(self, name), tuple) else (value,)):
                raise UserError(f"--{name} has an empty value; leave it out, or name something")
        for prefix, what in (("tree:", "folder"), ("hub:", "data set")):
            if prefix in self.input:  # an unset variable of the shell; `tree:` would be all of the current folder
                raise UserError(f"--input {prefix} names no {what}; leave it out, or name one after the colon")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output} is a file; name a folder")

    def identity(self) -> dict[str, Any]:
        """The arguments that decide the output's bytes, as a manifest has them."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}

    @classmethod
    def default(cls, name: str) -> Any:
        """Of an argument that came after a manifest was written: what the job did then."""
        return next((f.default for f in fields(cls) if f.name == name and f.default is not MISSING), None)


def parse(arguments: Sequence[str]) -> PreprocessArguments:
    """The command line, checked. Raises UserError."""
    found = build_parser().parse_args(arguments)
    found.suffixes = [_suffix(ending) for ending in found.suffixes]
    return as_dataclass(PreprocessArguments, found)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder")
    return Path(text)


def _suffix(ending: str) -> str:
    """`py`, `.py` and `*.py` mean the same, `all` any file."""
    ending = ending.removeprefix("*")
    return "" if ending == "all" else ending if ending.startswith(".") or not ending else f".{ending}"


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python data/preprocess.py",
        description="Turn source code into packed, verified token shards.",
        examples=EXAMPLES,
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="SRC",
        help="files, folders and globs of .json .jsonl (.gz .zst .bz2 .xz), .parquet or .tar; tree:FOLDER; stdlib; hub:NAME",
    )
    p.add_argument(
        "--output", type=_folder, required=True, metavar="DIR", help="folder for the shards; the same command resumes a killed job"
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="NAME", help="a tokenizer.json, a folder that has one, or a name on the hub")
    which.add_argument(
        "--train_tokenizer", type=int, metavar="VOCAB", help="train a byte-level BPE tokenizer of this size on the input"
    )
    p.add_argument("--suffixes", nargs="+", metavar="ENDING", help="which files of trees and archives to read: .py .c .h, or all")
    p.add_argument("--text_field", metavar="FIELD", help="name of the field that holds the text")
    p.add_argument("--split", metavar="NAME", help="which split of a hub: data set")
    p.add_argument("--validation_fraction", type=float, metavar="X", help="share of documents for validation, chosen by hash")
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes; under mpiexec, its ranks",
    )
    p.add_argument("--shard_tokens", type=int, metavar="N", help="close a shard after the document that reaches this size")
    p.add_argument("--on_error", choices=("skip", "fail"), help="what to do about a broken document or file")
    p.add_argument("--max_document_bytes", type=int, metavar="N", help="split longer documents at line ends")
    p.add_argument("--encoder", choices=("auto", "reference"), help="reference: use only the tokenizers library (slow)")
    _add_quality(p.add_argument_group("what to leave out"))
    _add_fim(p.add_argument_group("fill-in-the-middle"))
    # Those of the dataclass, but that a command takes all cores; lists, as the help shows them.
    defaults = {f.name: f.default for f in fields(PreprocessArguments) if f.default is not MISSING}
    lists = {name: list(value) for name, value in defaults.items() if isinstance(value, tuple)}
    p.set_defaults(**{**defaults, **lists, "workers": len(os.sched_getaffinity(0))})
    return p


def _add_quality(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--dedup",
        choices=("none", "exact", "near"),
        help="exact: remove documents that differ only in white space; near: also similar ones (MinHash)",
    )
    p.add_argument(
        "--filter",
        choices=("none", "codeparrot"),
        help="codeparrot: remove generated files and those with long lines or few letters and digits",
    )
    p.add_argument("--licenses", nargs="+", metavar="NAME", help="keep only documents with one of these licenses")
    p.add_argument("--license_field", metavar="FIELD", help="name of the field that holds the license or licenses")
    p.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="FILE",
        help="benchmarks (JSON Lines); remove documents that share ten words in a row with one",
    )


def _add_fim(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--fim_rate", type=float, metavar="X", help="share of training documents to rearrange for infilling")
    p.add_argument("--fim_spm_rate", type=float, metavar="X", help="share of these in suffix-prefix-middle order")
    p.add_argument("--fim_validation", action="store_true", help="also rearrange documents of the validation split")
    p.add_argument("--seed", type=int, metavar="N", help="random seed of the choice of documents and cuts")
