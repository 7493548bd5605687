"""The benchmarks of --decontaminate: read, and described for the job's identity."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from data.filters.contamination import Contamination
from data.sources.blocks import ReadOptions, Rejection
from data.sources.discover import Source
from data.sources.documents import read_rows
from data.sources.read import read_blocks

#: The fields that show a task or its answer: of HumanEval, its infilling sets and MBPP (openai, mxeval and EvalPlus spellings),
#: MultiPL-E, BigCodeBench, DS-1000, LiveCodeBench and APPS. Lists, as MBPP's tests, count by their elements, laid end to end.
FIELDS = (
    *("prompt", "canonical_solution", "suffix", "test", "text", "code", "content"),
    *("test_list", "challenge_test_list", "test_setup_code", "tests", "assertion"),
    *("complete_prompt", "instruct_prompt", "reference_code", "code_context"),
    *("question_content", "starter_code", "question", "solutions", "description"),
)


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
            texts += [text for field in FIELDS if (text := _text(row.value.get(field)))]
    if not texts:
        raise UserError(f"--decontaminate {path}: no row has one of the fields {', '.join(FIELDS)}")
    return texts


def _text(value: Any) -> str | None:
    """A field's words: a single assert of MBPP has fewer than the rule asks for, the three of a task have more. APPS has a list's
    JSON as a text, whose escapes would be parts of words."""
    parts = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            parts = json.loads(value)
    if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
        return "\n".join(parts)
    return value if isinstance(value, str) else None


def describe(files: Sequence[str]) -> list[list[Any]]:
    """[name, bytes] of each file, for the job's identity."""
    return [[f, Path(f).stat().st_size if Path(f).is_file() else None] for f in files]
