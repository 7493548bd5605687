"""For humaneval_sandboxed.yaml: the verdict on one document. lm-eval loads this file by its path.

Our repository must be importable then (PYTHONPATH).
"""

from __future__ import annotations

import functools
import os
from typing import Any

from launch.evaluation.execution import execute
from launch.evaluation.problems import from_humaneval
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import Isolation
from launch.evaluation.scoring import prepare_isolation


@functools.cache
def isolation() -> Isolation:
    return prepare_isolation("auto", Limits(), required=False)


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 for a completion that passes its tests. `results` has one completion, up to its stop string."""
    job = from_humaneval(document).job(results[0])
    verdict = execute(job, level=isolation().level, limits=Limits(), slot=os.getpid())
    return {"pass@1": float(verdict.passed)}
