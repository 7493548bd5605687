"""What the benchmarks that time calls share."""

from __future__ import annotations

import argparse

import pytest
import torch

from launch.benchmarks.measure import add_measuring_flags


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_measuring_flags(made, repeats=1)
    return made


@pytest.mark.parametrize("device", ["foo", "", "cpu:x", "meta", "mps", "cuda:4711"])
def test_a_device_that_is_none_is_a_sentence(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in torch's traceback; `cuda:4711` is what `cuda` is without a GPU."""
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["--device", device])
    assert left.value.code == 2 and f"argument --device: {device} " in capsys.readouterr().err


def test_a_device_that_is_here_is_taken() -> None:
    assert parser().parse_args(["--device", "cpu"]).device == "cpu"
    assert torch.device(parser().parse_args([]).device).type in ("cpu", "cuda")
