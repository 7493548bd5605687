"""`--deterministic`: what is switched on where, and that nothing computes with memory that nobody has written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts

from data.cli import UserError
from launch.engine import determinism, expert_parallel
from model import MoEGPTConfig, MoEGPTForCausalLM


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (determinism.CUBLAS, determinism.NCCL):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(cudnn, name, name == "benchmark")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = memory


def test_libraries_are_told_before_they_start() -> None:
    determinism.enable()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert not torch.backends.cudnn.benchmark and torch.backends.cudnn.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "^NVLS,NVLSTree")


def test_what_the_user_has_set_stays_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    determinism.enable()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Ring")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    said = r"^--deterministic needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, not ':4096:2'; unset it"
    with pytest.raises(UserError, match=said):
        determinism.enable()


@pytest.mark.parametrize("deterministic", [False, True])
def test_products_that_try_out_their_tiles_are_left_out(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart may find another tile the fastest, and rounds otherwise then."""
    taken: list[Any] = []
    monkeypatch.setattr(expert_parallel, "triton_products", lambda: "theirs")
    monkeypatch.setattr(expert_parallel, "grouped_linears", lambda *_, by: taken.append(by))
    torch.use_deterministic_algorithms(deterministic)
    experts = expert_parallel.Experts.__new__(expert_parallel.Experts)
    assert isinstance(experts, GroupedExperts)
    vars(experts).update(use_triton_grouped_mm=True, num_experts=4)
    experts._products(torch.zeros(1, 1), torch.zeros(4, dtype=torch.int32))
    assert taken == [expert_parallel.OURS if deterministic else "theirs"]


def test_nothing_reads_memory_that_nobody_has_written() -> None:
    """PyTorch would fill it with NaN, unless told not to: with it losses and gradients are those without."""

    def computed(fill: bool) -> list[torch.Tensor]:
        torch.use_deterministic_algorithms(fill)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.manual_seed(1)
        model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", num_hidden_layers=2, vocab_size=128))
        tokens = torch.randint(0, 128, (2, 65))
        loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    filled = computed(True)
    assert torch.empty(4).isnan().all()
    assert all(map(torch.equal, filled, computed(False))) and len(filled) > 20
