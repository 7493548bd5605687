"""Pack what `make gpu` needs on a machine without a network: `make gpu-bundle`.

    python tests/gpu/bundle.py [--output build/gpu-bundle] [--python 3.12]

The machine must have a GPU, Python of that version and PyTorch 2.11 or newer with transformers, pytest, pyarrow, xxhash and psutil.
The bundle brings the rest as wheels (DeepSpeed is built here: it is pure Python, its kernels compile where they run), the committed
sources, and `run.sh`, which installs without an index and starts the stations of `acceptance.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60.0
#: Binary wheels, for the Python that the bundle is for.
WHEELS = (
    *("orjson", "isal", "gigatoken", "awkward", "awkward-cpp", "rensa", "pydantic", "pydantic-core", "hypothesis"),
    *("xxhash", "msgpack"),
)
#: Pure Python, from wheels or sources.
PURE = (
    "deepspeed",
    "hjson",
    "einops",
    "annotated-types",
    "typing-inspection",
    "sortedcontainers",
    "importlib-metadata",
    "zipp",
    "lazy-importer",
)
RUN = """#!/usr/bin/env bash
# Installs the wheels beside this file into an environment that sees the machine's own PyTorch, then runs every station.
set -euo pipefail
cd "$(dirname "$0")"
found=$(python3 -c "import sys; print('%d.%d' % sys.version_info[:2])")
if [ "$found" != {version} ]; then
    echo "error: this bundle is for Python {version}, and python3 is $found here; pack it anew:" >&2
    echo "make gpu-bundle BUNDLE_ARGS='--python $found'" >&2
    exit 2
fi
python3 -m venv --system-site-packages environment
# The machine's PyTorch may itself live in a virtual environment, which --system-site-packages does not see.
python3 -c "import site; print('\\n'.join(site.getsitepackages()))" > environment/lib/python{version}/site-packages/host.pth
environment/bin/python -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
cd source
exec ../environment/bin/python tests/gpu/acceptance.py "$@"
"""


def pins() -> dict[str, str]:
    """The tested versions of constraints.txt, by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def requirements(names: tuple[str, ...]) -> list[str]:
    tested = pins()
    return [f"{name}=={tested[name]}" if name in tested else name for name in names]


def pip(*arguments: object) -> None:
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True, env=environment)


def resolve(wheels: Path, version: str) -> None:
    """Awkward and its compiled half, and pydantic and its own, must fit each other: pip's resolver chooses those."""
    platform = ("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--python-version", version)
    download = ("download", "--dest", wheels, "--only-binary=:all:", *platform)
    pip(*download, "--no-deps", *requirements(tuple(n for n in WHEELS if n not in ("awkward-cpp", "pydantic-core"))))
    for package, compiled in (("awkward", "awkward-cpp"), ("pydantic", "pydantic-core")):
        pip(*download, "--no-deps", f"{compiled}=={_needed(wheels, package, compiled)}")


def _needed(wheels: Path, package: str, compiled: str) -> str:
    """The version of `compiled` that the downloaded wheel of `package` names in its metadata."""
    import zipfile

    (wheel,) = wheels.glob(f"{package}-[0-9]*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    wanted = [line for line in lines if line.startswith("Requires-Dist:") and compiled in line.replace("_", "-")]
    return wanted[0].split("==")[1].split(";")[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/gpu-bundle"))
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine (default: 3.12)")
    arguments = parser.parse_args()
    output, wheels = arguments.output, arguments.output / "wheels"
    shutil.rmtree(output, ignore_errors=True)
    (output / "source").mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(output / "source")], input=archive, check=True)
    resolve(wheels, arguments.python)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, *requirements(PURE))
    run = output / "run.sh"
    run.write_text(RUN.replace("{version}", arguments.python), encoding="utf-8")
    run.chmod(0o755)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    print(f"{output}: {len(list(wheels.glob('*.whl')))} wheels, {size:.1f} MB; on the GPU machine: ./run.sh")
    if size > LIMIT_MB:
        print(f"error: {size:.1f} MB is more than {LIMIT_MB:.0f} MB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
