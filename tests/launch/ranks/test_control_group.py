"""All ranks get the results, or all raise: a user's mistake as one sentence, a fault of the program with its traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery

from data.cli import UserError
from launch.cli import RankFailedError
from launch.ranks.control_group import ControlGroup

AGREEING = str(Path(__file__).parent / "agreeing.py")


def run(nursery: Nursery, tmp_path: Path, case: str) -> tuple[list[int], str]:
    ranks = nursery.start(2, AGREEING, case, log=tmp_path / "log")
    return ranks.wait(60), ranks.text()


def test_results(nursery: Nursery, tmp_path: Path) -> None:
    codes, said = run(nursery, tmp_path, "results")
    assert codes == [0, 0]
    for rank in (0, 1):
        assert f"rank {rank} got (['0', '1'], 'by 0')" in said


@pytest.mark.parametrize(
    "case, sentence",
    [
        ("mistake", "rank 1: no such thing"),
        ("disk", "rank 1: /d/f: No space left on device; make room"),
        ("mistake of rank 0", "nothing there"),
    ],
)
def test_a_mistake_is_one_sentence_for_all(nursery: Nursery, tmp_path: Path, case: str, sentence: str) -> None:
    codes, said = run(nursery, tmp_path, case)
    assert codes == [2, 2], said
    assert "Traceback" not in said
    assert said.count(f"raised AgreedError: {sentence}") == 2
    assert [line[: len(sentence) + 7] for line in said.splitlines() if line.startswith("error")] == [f"error: {sentence}"]


@pytest.mark.parametrize(
    "case, culprit, cause",
    [
        ("fault", 1, "KeyError: 'weights'"),
        ("assertion of rank 0", 0, "AssertionError"),
        ("value", 0, "ValueError: not a user's"),
        ("unpicklable", 1, "Unpicklable: has a lock"),
    ],
)
def test_a_fault_keeps_its_traceback_and_is_named(nursery: Nursery, tmp_path: Path, case: str, culprit: int, cause: str) -> None:
    codes, said = run(nursery, tmp_path, case)
    assert codes == [1, 1], said
    assert f"rank {1 - culprit} raised RankFailedError: rank {culprit} failed: {cause}" in said
    assert f"rank {culprit} raised" not in said
    assert "in action\n" in said, "the frame that raised it"


def test_a_fault_of_another_rank_comes_before_an_own_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code would say that the input is to be mended."""
    ranks = ControlGroup()

    def with_another(mine: Any) -> list[Any]:
        other = type(mine)()
        other.fault = "KeyError: 'weights'"
        return [mine, other]

    def mistaken() -> None:
        raise UserError("no such thing")

    monkeypatch.setattr(ranks, "gather", with_another)
    with pytest.raises(RankFailedError, match="rank 1 failed: KeyError"):
        ranks.run_everywhere(mistaken)


def test_one_process_agrees_with_itself() -> None:
    alone = ControlGroup()
    assert alone.run_everywhere(lambda: 1) == [1] and alone.run_on_rank0(lambda: 2) == 2
    with pytest.raises(KeyError):
        alone.run_on_rank0(lambda: {}["weights"])
