"""Package metadata. `make install` (or `pip install -c constraints.txt -e .[dev]`) installs the tested versions."""

from pathlib import Path

from setuptools import setup

setup(
    name="moe-code-gpt",
    version="0.1.0",
    description="Train Mixture-of-Experts GPT code models with DeepSpeed: text in, a trained and exported model out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["model", "data", "launch", "launch.benchmarks"],
    package_data={"model": ["presets/*.json"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",  # the first with correct universal conversion of expert optimizer states
        "transformers>=5.0",
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
        # Never required: without it attention runs on PyTorch's own flash kernels.
        "flash": ["flash-attn>=2.7"],
        # An MPI runtime from PyPI, for `mpiexec` where the system has none.
        "mpi": ["mpich>=4.3"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.9", "mypy>=1.14", "mpich>=4.3"],
    },
)
