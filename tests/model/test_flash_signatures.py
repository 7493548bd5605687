"""The stand-ins that `test_flash.py` tests our adapters with, against the sources of the real packages, fetched by pip.

Slow, since it needs the network: an upstream change of a signature is seen here before it is seen on a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.flash import FlashAttn3
from model.mask import causal_mask

HERE = Path(__file__).parent
FA2, FA3, FA4 = "flash_attn/flash_attn_interface.py", "hopper/flash_attn_interface.py", "flash_attn/cute/interface.py"
#: Requirement, file in it, the stand-in's method for each function.
PACKAGES = [
    (requirement, FA2, {"_flash_attn_forward": "fa2_forward", "_flash_attn_backward": "fa2_backward",
                        "_flash_attn_varlen_forward": "fa2_varlen_forward", "_flash_attn_varlen_backward": "fa2_varlen_backward"})
    for requirement in ("flash-attn==2.7.0.post2", "flash-attn")
] + [
    ("flash-attn", FA3, {"_flash_attn_forward": "fa3_forward", "_flash_attn_backward": "fa3_backward"}),
    ("flash-attn-4", FA4, {"_flash_attn_fwd": "fa4_forward", "_flash_attn_bwd": "fa4_backward"}),
]  # fmt: skip


def standin() -> Any:
    spec = importlib.util.spec_from_file_location("flash_standins", HERE / "test_flash.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Standin


def source_of(requirement: str, file: str, folder: Path) -> str:
    """A file of a package as pip serves it; its build, which would want nvcc, is told not to compile."""
    env = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--pre", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot fetch {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = folder.iterdir()
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(file).decode()
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(f"/{file}"))
        found = tar.extractfile(member)
        assert found is not None
        return found.read().decode()


def signature(source: str, function: str) -> list[tuple[str, bool]]:
    """(name, has a default) of each parameter that can be given by position, and then of those by keyword alone."""
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function)
    positional = [*node.args.posonlyargs, *node.args.args]
    bare = len(positional) - len(node.args.defaults)
    given = [(a.arg, index >= bare) for index, a in enumerate(positional)]
    return given + [(a.arg, d is not None) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("requirement", "file", "functions"), PACKAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_stand_ins_have_the_packages_signatures(requirement: str, file: str, functions: dict[str, str], tmp_path: Path) -> None:
    source = source_of(requirement, file, tmp_path)
    for name, method in functions.items():
        theirs = signature(source, name)
        ours = list(inspect.signature(getattr(standin(), method)).parameters.values())
        by_position = [p.name for p in ours if p.kind is not p.KEYWORD_ONLY]
        by_keyword = {p.name for p in ours if p.kind is p.KEYWORD_ONLY}
        # flash-attn 3's releases differ in how they spell two names, so our adapter gives those by position.
        spelled_alike = [a == b[0] for a, b in zip(by_position, theirs, strict=False)]
        assert spelled_alike.count(False) <= (3 if file == FA3 else 0), (requirement, name, by_position, theirs)
        known = {parameter for parameter, _ in theirs}
        assert by_keyword <= known, (requirement, name, by_keyword - known)
        needed = {parameter for parameter, default in theirs[len(by_position) :] if not default}
        if method == "fa3_forward":
            needed = set()  # the adapter gives None for whatever a release has without a default, see the next test
        assert needed <= by_keyword, (requirement, name, needed)


def test_flash_attn_3_releases_without_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.8.3's sources want all 25 arguments; newer ones have defaults for those that training does not use."""
    given: dict[str, Any] = {}

    def forward(
        q: Any, k: Any, v: Any, k_new: Any, page_table: Any, softmax_scale: Any, causal: Any, window: Any = (-1, -1)
    ) -> Any:
        given.update(k_new=k_new, page_table=page_table, softmax_scale=softmax_scale, causal=causal)
        return q, torch.zeros(1, 2, 4)

    package = types.ModuleType("flash_attn_interface")
    package._flash_attn_forward = forward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q = torch.randn(1, 4, 2, 8)
    FlashAttn3().forward(q, q, q, causal_mask((1, 4), 0, torch.device("cpu")), 0.5)
    assert given == {"k_new": None, "page_table": None, "softmax_scale": 0.5, "causal": True}


def test_torchs_own_operators_have_the_schema_that_is_called() -> None:
    """PyTorch's CUDA flash attention is called by position, so its order is compared; the CPU build has the schema too."""
    forward = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    backward = [a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    assert forward[:10] == ["query", "key", "value", *lengths, "dropout_p", "is_causal", "return_debug_mask"]
    assert backward[:14] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp"), *lengths, "dropout_p", "is_causal", "rng_state", "unused",
    ]  # fmt: skip
    assert "scale" in forward and "scale" in backward
