"""What tests of several commands share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(small_model: Path, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `launch/export.py`'s, with weights of a large scale: not every token is as likely as another."""
    import torch

    from launch.model_config import load_model_config
    from model import MoEGPTForCausalLM

    folder = tmp_path_factory.mktemp("exported") / "hf"
    torch.manual_seed(0)
    config = load_model_config(str(small_model), initializer_range=0.2, eos_token_id=0)
    MoEGPTForCausalLM(config).save_pretrained(folder)
    for path in (small_shards / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
