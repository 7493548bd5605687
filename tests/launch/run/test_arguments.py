"""`launch/train.py`'s command line: what is not given, by what is."""

from __future__ import annotations

import pytest

from data.cli import UserError
from launch.run.arguments import parse_arguments
from model.config import MoEGPTConfig
from model.config_json import PRESETS_FOLDER

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


@pytest.mark.parametrize(
    "flag", ["--stop_after=-1", "--max_hours=-1", "--max_hours=nan", "--max_hours=inf", "--spike_sigma=nan", "--spike_sigma=-6"]
)
def test_what_is_off_by_0_is_never_less(flag: str) -> None:
    """A negative --stop_after trained nothing and called itself finished; NaN sigmas are above no spike."""
    name, value = flag.split("=")
    with pytest.raises(UserError, match=rf"^{name} must be 0 or a number above it, not {value}"):
        parse_arguments(["--data", "shards", "--output", "run", flag])


@pytest.mark.parametrize(("window", "right"), [("0", True), ("1", False), ("31", False), ("32", True)])
def test_a_window_in_which_no_step_is_ever_judged_is_refused(window: str, right: bool) -> None:
    """Spikes were not looked for, without a word."""
    flags = ["--data", "shards", "--output", "run", "--spike_window", window]
    if right:
        assert parse_arguments(flags).spike_window == int(window)
        return
    with pytest.raises(UserError, match=rf"^--spike_window must be 0 \(off\) or at least 32, .* not {window}"):
        parse_arguments(flags)


@pytest.mark.parametrize("value", ["0", "0.5", "nan", "inf"])
def test_a_context_is_extended_by_a_number_from_1_on(value: str) -> None:
    with pytest.raises(UserError, match=r"^--rope_factor must be from 1 to 16,777,216, not "):
        parse_arguments(["--data", "shards", "--output", "run", "--rope_factor", value])


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_stall_is_after_some_time(value: str) -> None:
    with pytest.raises(UserError, match=r"^--stall_timeout must be seconds above 0, such as 1800, not "):
        parse_arguments(["--data", "shards", "--output", "run", "--stall_timeout", value])
