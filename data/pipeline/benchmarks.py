"""The benchmarks of --decontaminate: read, and described for the job's identity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from data.filters.contamination import Contamination
from data.sources.blocks import ReadOptions, Rejection
from data.sources.discover import Source
from data.sources.documents import read_rows
from data.sources.read import read_blocks

#: The fields of HumanEval, its infilling sets and MBPP (openai and mxeval spellings) that show a task or its answer.
FIELDS = ("prompt", "canonical_solution", "suffix", "test", "text", "code", "content")


def load_contamination(files: Sequence[str]) -> Contamination | None:
    """The rule against the tasks of all `files`; None where there are none."""
    texts: dict[str, list[str]] = {}
    for file in files:
        texts.setdefault(Path(file).name, []).extend(read_tasks(file))
    return Contamination(texts) if files else None


def read_tasks(path: str) -> list[str]:
    """All task and answer texts of a benchmark in any format that --input takes. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise NotFound(f"--decontaminate {path}: no such file")
    texts: list[str] = []
    for block in read_blocks([Source(kind="file", name=path, size=0)], ReadOptions(columns=FIELDS, needed=())):
        for row in (*block.rejections, *read_rows(block)):
            if isinstance(row, Rejection):
                where = f" line {row.line}" if row.line else ""
                raise UserError(f"--decontaminate {path}{where}: {row.reason}")
            texts += [value for field in FIELDS if isinstance(value := row.value.get(field), str)]
    if not texts:
        raise UserError(f"--decontaminate {path}: no row has one of the fields {', '.join(FIELDS)}")
    return texts


def describe(files: Sequence[str]) -> list[list[Any]]:
    """[name, bytes] of each file, for the job's identity."""
    return [[f, Path(f).stat().st_size if Path(f).is_file() else None] for f in files]
