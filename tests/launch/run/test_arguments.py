"""`launch/train.py`'s command line: what is not given, by what is."""

from __future__ import annotations

import pytest

from launch.run.arguments import parse_arguments
from model.config import MoEGPTConfig
from model.sizes import PRESETS_FOLDER

MODELS = sorted(path.stem for path in PRESETS_FOLDER.glob("*.json"))


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        *((["--model", name], min(2048, MoEGPTConfig.preset(name).max_position_embeddings)) for name in MODELS),
        (["--model", "tiny", "--sequence_length", "64"], 64),
        (["--model", "tiny", "--rope_factor", "4"], 2048),  # which extends its 1,024 positions
        (["--model", "no such"], 2048),  # refused later, for what it is
    ],
)
def test_samples_are_as_long_as_the_model_can_up_to_the_usual_length(flags: list[str], length: int) -> None:
    assert parse_arguments(["--data", "shards", "--output", "run", *flags]).sequence_length == length
