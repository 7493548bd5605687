"""`launch/train.py` on ranks that see other files under the same relative path: each starts in `hostR` of the folder in HOSTS."""

import os
from pathlib import Path

from launch.cli import run_command
from launch.train import main

if __name__ == "__main__":
    os.chdir(Path(os.environ["HOSTS"]) / f"host{os.environ['RANK']}")
    run_command(main)
