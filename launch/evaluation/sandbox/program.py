"""The command of a fresh interpreter that carries our programs (`inside/`) with it as text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PACKAGE = "launch.evaluation.sandbox.inside"
#: -I: no environment, no user's packages, no current folder. -S: no site packages at all. UTF-8, as there is no locale.
FLAGS = ("-I", "-S", "-B", "-X", "utf8")
BOOT = """
import sys
from importlib.machinery import ModuleSpec
class Carried:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, Carried, is_package=not TEXTS[name]) if name in TEXTS else None
    @staticmethod
    def create_module(spec):
        return None
    @staticmethod
    def exec_module(module):
        exec(compile(TEXTS[module.__name__], module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Carried)
import json
from {package}.main import main
main(json.loads(sys.argv[1]))
"""


@functools.cache
def program_text() -> str:
    """BOOT with the modules of `inside/`. It stays below the 128 KiB that Linux allows one argument."""
    parts = PACKAGE.split(".")
    texts = {".".join(parts[: n + 1]): "" for n in range(len(parts))}
    for path in sorted((Path(__file__).parent / "inside").glob("*.py")):
        if path.stem != "__init__":
            texts[f"{PACKAGE}.{path.stem}"] = path.read_text(encoding="utf-8")
    return f"TEXTS = {texts!r}\n" + BOOT.replace("{package}", PACKAGE)


def python_command(python: str, config: dict[str, Any]) -> list[str]:
    return [python, *FLAGS, "-c", program_text(), json.dumps(config)]
