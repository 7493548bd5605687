"""The Triton kernels: numerics under Triton's interpreter against the plain formulas in float64, costs against their shapes.

Triton is not in the main environment, where it would switch DeepSpeed's own paths: `.ci/run` puts it into `.triton/`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

import pytest
import torch
from support import ROOT
from torch.library import CustomOpDef

from model import operators
from tests.model.triton_worker import run_interpreted, run_worker

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Found:
    """What the worker prints: see there."""

    errors: dict[str, float]
    lifts: dict[str, float]
    rounded: dict[str, float]
    edges: dict[str, bool]
    loops: dict[str, tuple[int, float]] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)
    graphs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def found() -> Found:
    return Found(**run_interpreted("kernels_worker.py"))


def limit(name: str) -> float:
    """bf16 may be off by a rounding of inputs, intermediate sums in fp32, and results."""
    return 1e-2 if name.startswith("bfloat16") else 2e-6


def too_far(found: Found) -> dict[str, float]:
    assert len(found.errors) > 30
    return {name: value for name, value in found.errors.items() if not value < limit(name)}


def test_kernels_equal_the_formulas_in_float64(found: Found) -> None:
    """Outputs and gradients."""
    assert too_far(found) == {}


def test_every_loop_goes_round_again_and_is_missed_where_it_does_not(found: Found) -> None:
    """The cases are small; programs and blocks are made so too, or no loop that a real size takes would be held to anything."""
    assert len(found.loops) >= 9
    once = {loop: trips for loop, (trips, _) in found.loops.items() if trips < 2}  # the last trip short
    unseen = {loop: error for loop, (_, error) in found.loops.items() if error < 0.1}
    assert (once, unseen) == ({}, {})


def test_operators_say_of_themselves_what_is_so(found: Found) -> None:
    """Shapes, dtypes, strides and what they write to: what a compiler, and the benchmark's count, go by."""
    every = {name for name, operator in vars(operators).items() if isinstance(operator, CustomOpDef)}
    assert set(found.operators) == every and len(every) >= 15
    assert {name: wrong for name, wrong in found.operators.items() if wrong} == {}


def test_a_compiled_region_has_the_operators_in_it(found: Found) -> None:
    assert found.graphs == ["add_sink", "norm", "norm_backward", "norm_rope", "norm_rope_backward", "sink_gradient"]
    assert found.errors["compiled"] == 0


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    """The same cases, and sizes of `800m`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = Found(**run_worker("kernels_worker.py", "--gpu"))
    assert sum(name.endswith("real sizes") for name in found.errors) >= 14
    assert too_far(found) == {} and max(found.lifts.values()) <= 1
    assert min(found.rounded.values()) >= 0.99 and all(found.edges.values()), (found.rounded, found.edges)


def test_a_lift_is_counted_in_its_bin(found: Found) -> None:
    """Or, where it lies at a bin's end, in the next."""
    assert len(found.lifts) == 4
    assert max(found.lifts.values()) <= 1, found.lifts


def test_sums_are_in_fp32_and_rounded_once(found: Found) -> None:
    """As the kernels say of themselves; a second rounding is too small for the errors' limit."""
    assert len(found.rounded) == 16 and min(found.rounded.values()) >= 0.99, found.rounded


def test_values_that_random_numbers_never_have(found: Found) -> None:
    assert len(found.edges) == 8 and all(found.edges.values()), found.edges


def test_equal_scores_choose_the_lower_index(found: Found) -> None:
    assert found.errors["ties"] == 0


def test_a_target_past_the_vocabulary_makes_the_loss_no_number(found: Found) -> None:
    """Where PyTorch's own kernel ends the process; what lay there was another row's."""
    assert found.errors["impossible targets"] == 0


def test_what_programs_add_up_together_is_integers() -> None:
    """An atomic sum of floats would depend on who comes first: `--deterministic` promises that nothing here does."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "model" / "kernels").glob("*.py")]
    calls = [ast.unparse(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    atomic = [call for call in calls if call.startswith("tl.atomic_")]
    assert len(atomic) == 2 and any("tl.sum(hits, axis=0).to(tl.int64)" in call for call in atomic)
    assert any(", one, mask=" in call for call in atomic)
    assert any(call == "tl.full((TOKENS, E), 1, dtype=tl.int64)" for call in calls)  # one
    assert not any("autotune" in ast.unparse(tree) for tree in trees)  # nor on which tile was the fastest today


def test_kernels_are_for_gpus_and_not_for_float64() -> None:
    assert not operators.usable(torch.zeros(1))
    double = torch.empty(1, dtype=torch.float64, device="meta")
    assert not operators.usable(double)


@pytest.mark.parametrize(("value", "here"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_turns_them_off(value: str | None, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README tells whoever has odd losses on a GPU alone. Past the cache, which another process begins without."""
    monkeypatch.setattr(operators, "find_spec", lambda name: name)
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("MOE_KERNELS", value)
    assert operators.has_triton.__wrapped__() is here
