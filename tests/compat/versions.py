"""The oldest, the tested and the newest PyTorch and transformers, each with the tests that depend on them: `make compat`.

    python tests/compat/versions.py [--only floor tested newest] [--folder build/compat]

Each set gets an environment of its own (a CUDA build of PyTorch is 5 GB), then the tests of `model/` and `data/` and, on one rank,
the whole line: data, training, a resume, conversions, export. One set that fails does not stop the others; the table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: What is installed instead of the tested set's; an empty version means the newest that pip serves.
SETS: dict[str, dict[str, str]] = {
    "floor": {"torch": "2.11.0", "transformers": "5.17.0"},
    "tested": {},
    "newest": {"torch": "", "transformers": ""},
}
TESTS = ("tests/model", "tests/data")
STATIONS = ("data", "train", "resume", "convert", "export")


def constraints(folder: Path, changed: dict[str, str]) -> Path:
    """constraints.txt with other versions. Packages that transformers itself pins follow it where it changes."""
    free = {*changed, *(("tokenizers", "safetensors") if "transformers" in changed else ())}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split("==")[0] not in free]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*kept, *(f"{name}=={version}" for name, version in changed.items() if version)]) + "\n")
    return path


def install(folder: Path, changed: dict[str, str]) -> Path:
    """The environment's Python, with the project's dependencies in the versions of the set."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pinned = constraints(folder, changed)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(pinned)]
    torch = next((line for line in pinned.read_text().splitlines() if line.startswith("torch==")), "torch")
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--upgrade", "--editable", f"{ROOT}[dev]"], check=True)
    return python


def check(python: Path, folder: Path) -> tuple[str, dict[str, str]]:
    """(versions, what each part said) of one environment."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    code = "import deepspeed, torch, transformers; print(torch.__version__, transformers.__version__, deepspeed.__version__)"
    versions = subprocess.run([str(python), "-c", code], env=env, capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]
    said = {}
    for tests in TESTS:
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        (folder / f"{Path(tests).name}.log").write_text(done.stdout + done.stderr)
        said[tests] = done.stdout.strip().splitlines()[-1]
    figures = folder / "line.json"
    command = [
        str(python),
        "tests/gpu/acceptance.py",
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--steps",
        "6",
        "--sequence_length",
        "64",
    ]
    command += [
        "--folder",
        str(folder / "line"),
        "--output",
        str(figures),
        "--minutes",
        "60",
        "--limit",
        "900",
        "--only",
        *STATIONS,
    ]
    subprocess.run(command, cwd=ROOT, env=env, check=False)
    stations = json.loads(figures.read_text())["stations"]
    said["one rank"] = ", ".join(f"{name} {'ok' if s['ok'] else 'FAILED: ' + s['reason']}" for name, s in stations.items())
    return versions, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat")
    arguments = parser.parse_args()
    lines, failed = [], False
    for name in arguments.only:
        folder = (arguments.folder / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            versions, said = check(install(folder, SETS[name]), folder)
        except subprocess.CalledProcessError as error:
            versions, said = "?", {"install": f"FAILED: {error}"}
        minutes = (time.monotonic() - began) / 60
        lines += [
            f"{name}: torch, transformers, deepspeed {versions}, {minutes:.0f} minutes",
            *(f"    {k}: {v}" for k, v in said.items()),
        ]
        failed |= any("fail" in text.lower() or "error" in text.lower() for text in said.values())
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
