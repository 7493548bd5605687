"""What tests share: small shards of real code, a model to match, and a way to start ranks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from nursery import Nursery
from support import ROOT, deepspeed_command

from launch.ranks.spawn import RANK_VARIABLES

VOCABULARY = 512

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# An example that takes long says that the machine is busy, not that the code is wrong.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


#: What tests with ranks of their own ask for: these fill the cores, and wait for each other by the clock.
RANKS = ("nursery", "run_train", "forked", "site: Site", "deepspeed_command")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes: files with ranks of their own one after the other in one of them, all other files beside."""
    from xdist.scheduler import LoadFileScheduling

    class RanksInOneProcess(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return RanksInOneProcess(config, log)


@functools.cache
def group_of(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return "ranks" if any(word in text for word in RANKS) else path


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    """A test that leaves this process a rank has each later test's processes join it."""
    names = set(RANK_VARIABLES) - set(os.environ)
    yield
    left = {name: os.environ.pop(name) for name in names if name in os.environ}
    assert not left


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of part of the standard library, with a tokenizer of 512 tokens trained on it."""
    folder = tmp_path_factory.mktemp("small_shards")
    source = folder / "code"
    source.mkdir()
    library = Path(json.__file__).parent.parent
    for number, path in enumerate(sorted(library.glob("*.py"))[:60]):
        (source / f"{number:03d}_{path.name}").write_bytes(path.read_bytes())
    shards = folder / "shards"
    command = [sys.executable, "data/preprocess.py", "--input", str(source), "--train_tokenizer", str(VOCABULARY)]
    command += ["--output", str(shards), "--validation_fraction", "0.1", "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return shards


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json for `small_shards`: 2 layers, 8 experts in 4 groups, steps of milliseconds."""
    from model import MoEGPTConfig

    config = MoEGPTConfig.preset(
        "tiny", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32, intermediate_size=64
    )
    folder = tmp_path_factory.mktemp("small_model")
    config.save_pretrained(folder)
    return folder / "config.json"


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run_train() -> Run:
    """`run_train(ranks, *flags)`: `launch/train.py` by the `deepspeed` launcher, or directly for one rank."""

    def run(ranks: int, *flags: object, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
        launcher = deepspeed_command(ranks) if ranks > 1 else [sys.executable]
        command = [*launcher, "launch/train.py", *(str(flag) for flag in flags)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}, check=False
        )

    return run


@pytest.fixture
def forked(nursery: Nursery, tmp_path: Path) -> Run:
    """`forked(script, *flags, ranks=1)`: a command without its imports, and without the launcher, for what comes after them."""

    def run(script: str, *flags: object, ranks: int = 1) -> subprocess.CompletedProcess:
        said = {name: tmp_path / f"forked.{name}" for name in ("stdout", "stderr")}
        for path in said.values():
            path.unlink(missing_ok=True)
        codes = nursery.start(ranks, script, *flags, log=said["stdout"], errors=said["stderr"]).wait(240)
        return subprocess.CompletedProcess(flags, next(filter(None, codes), 0), *(path.read_text() for path in said.values()))

    return run


@pytest.fixture
def forked_train(forked: Run) -> Run:
    """As `run_train`."""
    return lambda ranks, *flags: forked("launch/train.py", *flags, ranks=ranks)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files and folders that are brought to the disk, in order."""
    found: list[Path] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        found.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return found


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts ranks without their imports; see tests/nursery.py."""
    nursery = Nursery()
    yield nursery
    nursery.close()
