"""Package metadata. `make install` (or `pip install -c constraints.txt -e .[dev]`) installs the tested versions."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="moe-code-gpt",
    version="0.2.0",
    description="Train Mixture-of-Experts GPT code models with DeepSpeed: text in, a trained and exported model out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],  # what the tests ran on
    packages=[*find_packages(include=["model", "model.*", "data", "data.*", "launch", "launch.*"]), "ds_configs"],
    package_data={
        "ds_configs": ["*.json"],
        "model": ["presets/*.json"],
        "launch.reporting": ["assets/*"],
        "launch.planning": ["devices.json"],
        "launch.evaluation.lm_eval": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",  # the first with correct universal conversion of expert optimizer states
        "transformers>=5.17",  # before, its Glm4Moe routes otherwise and some of what it promises fails: `make compat`
        "datasets>=4.0",
        "wandb>=0.19",
        "mpi4py>=4.0",
        # The data stage's own: each reads, encodes, hashes or compares at a multiple of the usual library's speed.
        "orjson>=3.10",
        "isal>=1.7",
        "gigatoken>=0.10",
        "rensa>=0.5",
        "xxhash>=3.5",
        "pyarrow>=19",
        "tqdm",
    ],
    extras_require={
        # Not needed: PyTorch's own CUDA kernel is FlashAttention 2. Its build imports torch, so it wants --no-build-isolation.
        "flash": ["flash-attn>=2.7"],
        # An MPI runtime from PyPI, for `mpiexec` where the system has none.
        "mpi": ["mpich>=4.3"],
        # Beside W&B for `--tracker`; tested with these.
        "trackers": ["tensorboard>=2.21", "trackio>=0.43"],
        # accelerate and peft: what transformers' users put around the model (tests/model/test_transformers.py).
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=1.14",
            "mpich>=4.3",
            "accelerate>=1.10",
            "peft>=0.18",
        ],
    },
)
