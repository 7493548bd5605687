"""A host without a compiler or Python's headers is told so before the first kernel is compiled, on a GPU and only there; one whose
GPU PyTorch cannot use before it trains on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from data.cli import UserError
from data.terminal import drain
from launch import toolchain
from launch.exported import model as exported
from model import MoEGPTConfig


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
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if device == "cpu":
        toolchain.check_toolchain(device)
        return
    with pytest.raises(ValueError, match=r"this host lacks a C compiler .*apt-get install gcc python3-dev"):
        toolchain.check_toolchain(device)
    MoEGPTConfig.preset("tiny").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(exported, "has_triton", lambda: True)
    with pytest.raises(ValueError, match="this host lacks a C compiler"):  # generate and evaluate: before a weight is read
        exported.load_exported(tmp_path, device=device)
    monkeypatch.setattr(exported, "has_triton", lambda: False)  # MOE_KERNELS=0 takes plain PyTorch
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        exported.load_exported(tmp_path, device=device)


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12020). Please update it."


@pytest.fixture
def unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """/dev and /proc/driver/nvidia/version of a host with a GPU for which PyTorch's CUDA is too new."""

    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").touch()
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n")
    return tmp_path, driver


def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_train_on_the_cpu(
    unusable: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = toolchain.unusable_gpu(*unusable)
    assert said is not None and re.search(r"driver 535\.183\.01\) cannot use: The NVIDIA driver .* too old .*; update", said)
    monkeypatch.setattr(toolchain, "unusable_gpu", lambda: said)
    with pytest.raises(UserError, match=f"{re.escape(said)}, or set DS_ACCELERATOR=cpu"):
        toolchain.check_driver(None)
    toolchain.check_driver("cpu")
    monkeypatch.undo()
    unusable[1].write_text("of another make")
    said = toolchain.unusable_gpu(*unusable)
    assert said is None or re.search(r"\(CUDA [^,]*\) cannot use", said)


def test_generating_goes_on_on_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It was slow without a word."""
    monkeypatch.setattr(toolchain, "unusable_gpu", lambda: "the driver is too old; update it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    toolchain._warn_of_unusable_gpu.cache_clear()
    assert toolchain.default_device() == toolchain.default_device() == "cpu"
    toolchain._warn_of_unusable_gpu.cache_clear()
    drain()
    said = capfd.readouterr().err
    assert said == "warning: the driver is too old; update it; until then this runs on the CPU\n"


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_who_hides_the_gpu_wants_the_cpu(hidden: str, unusable: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert toolchain.unusable_gpu(*unusable) is None


def test_a_host_or_a_job_without_a_gpu_trains_on_the_cpu(unusable: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    devices, driver = unusable
    with monkeypatch.context() as denied:  # as Slurm's cgroup does
        denied.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError()))
        assert toolchain.unusable_gpu(devices, driver) is None
    (devices / "nvidia0").rename(devices / "nvidiactl")
    assert toolchain.unusable_gpu(devices, driver) is None


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_is_asked_for_products_of_bf16(machine: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN says yes of every x86 with AVX-512, where bf16 takes 2.7 times as long without its own instructions."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has == (machine == "x86_64"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has == (machine != "x86_64"))
    assert toolchain.cpu_multiplies_bf16() == has
