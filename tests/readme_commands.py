"""The commands that a README tells its reader to type, taken from its text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

#: Blocks in these languages are typed; a block without a language is a drawing or an output.
SHELLS = ("bash", "sh", "shell", "console")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: Words before the script that start it.
LAUNCHERS = ("python", "python3", "deepspeed", "torchrun", "mpiexec", "srun")


@dataclass(frozen=True)
class Command:
    """One command line: `words` without comment, `source` for messages."""

    words: tuple[str, ...]
    source: str

    @property
    def script(self) -> str | None:
        """Path of the script of ours that it starts; None for anything else."""
        return next((word for word in self.words if re.fullmatch(r"(data|launch)/\w+\.py", word)), None)

    @property
    def flags(self) -> list[str]:
        """What follows the script."""
        assert self.script is not None
        return list(self.words[self.words.index(self.script) + 1 :])

    @property
    def program(self) -> str:
        """The first word that is not a setting of the environment."""
        return next(word for word in self.words if not re.fullmatch(r"[A-Z_]+=.*", word))

    def __str__(self) -> str:
        return f"{self.source}: {shlex.join(self.words)}"


def readmes() -> list[Path]:
    """Every README of ours."""
    folders = (ROOT, *(ROOT / name for name in ("data", "model", "launch", "ds_configs", "tests")))
    return [path for folder in folders for path in [folder / "README.md"] if path.is_file()]


def commands(readme: Path) -> list[Command]:
    """In the order of the text. `...` stands for the flags of the last command with the same script."""
    text = readme.read_text(encoding="utf-8")
    found: list[Command] = []
    for block in FENCE.finditer(text):
        if block[1] not in SHELLS:
            continue
        line_number = text[: block.start()].count("\n") + 2
        for line in block[2].replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\|\|)\s", line.strip().removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                if words:
                    source = f"{readme.relative_to(ROOT)}, block at line {line_number}"
                    found.append(_spelled_out(Command(tuple(words), source), found))
    return found


def _spelled_out(command: Command, before: list[Command]) -> Command:
    if "..." not in command.words or command.script is None:
        return command
    same = next(c for c in reversed(before) if c.script == command.script)
    at = command.words.index("...")
    return Command((*command.words[:at], *same.flags, *command.words[at + 1 :]), command.source)
