"""The benchmarks of attention, loss and experts run where DeepSpeed is not installed, as on a lent GPU machine."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT

WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_benchmark_without_deepspeed() -> None:
    sizes = ["--device", "cpu", "--tokens", "64", "--hidden", "16", "--vocabulary", "128", "--repeats", "1"]
    command = [sys.executable, "-c", WITHOUT, "launch/benchmark.py", "loss", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ours" in done.stdout
