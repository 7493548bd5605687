"""A host without a compiler or Python's headers is told so before the first kernel is compiled, on a GPU and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.run import toolchain


def make_host(folder: Path, *compilers: str, headers: bool = True) -> tuple[dict[str, str], Path]:
    """PATH with these compilers alone, and a folder for headers."""
    programs, include = folder / "bin", folder / "include"
    programs.mkdir()
    include.mkdir()
    for name in compilers:
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    if headers:
        (include / "Python.h").touch()
    return {"PATH": str(programs)}, include


@pytest.mark.parametrize("compiler", toolchain.COMPILERS)
def test_any_of_the_usual_compilers_will_do(tmp_path: Path, compiler: str) -> None:
    assert toolchain.missing_tools(*make_host(tmp_path, compiler)) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    environment, include = make_host(tmp_path, headers=False)
    compiler, headers = toolchain.missing_tools(environment, include)
    assert compiler == "a C compiler (gcc or clang or cc)" and str(include / "Python.h") in headers


def test_the_users_compiler_goes_before(tmp_path: Path) -> None:
    environment, include = make_host(tmp_path, "gcc")
    assert toolchain.missing_tools({**environment, "CC": "icx"}, include) == ["a C compiler (icx)"]
    assert toolchain.missing_tools({**environment, "CC": "gcc"}, include) == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_only_a_gpu_needs_them(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.get_accelerator(), "device_name", lambda *_: device)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if device == "cpu":
        toolchain.check_toolchain()
        return
    with pytest.raises(ValueError, match=r"this host lacks a C compiler .*apt-get install gcc python3-dev"):
        toolchain.check_toolchain()
