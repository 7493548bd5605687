"""A weight or a moment that is not finite is refused by the name of its parameter, whatever the layout; padding may be anything."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stub_engine import MODEL, StubEngine, manager, replace_file

from launch.checkpoint import universal
from launch.checkpoint.finite import check_finite, is_finite, named_tensors
from launch.checkpoint.unpickle import load_file
from launch.checkpoint.weights import CHUNK

OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def spoil_master(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][2][200] = math.nan


def spoil_moment(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg_sq"][0] = math.inf


def spoil_embedding(content: dict[str, Any]) -> None:
    content["module"]["model.embed_tokens.weight"][3, 1] = -math.inf


def spoil_bias(content: dict[str, Any]) -> None:
    content["model.layers.1.mlp.router.e_score_correction_bias"][0] = math.nan


CASES = [
    (OPTIMIZER, spoil_master, r"model\.layers\.0\.mlp\.experts\.w2 holds"),
    (OPTIMIZER, spoil_moment, r"exp_avg_sq\) holds"),
    ("mp_rank_00_model_states.pt", spoil_embedding, r"model\.embed_tokens\.weight holds"),
    ("buffers.pt", spoil_bias, r"model\.layers\.1\.mlp\.router\.e_score_correction_bias holds"),
]


@pytest.mark.parametrize(("name", "spoil", "named"), CASES, ids=[case[1].__name__ for case in CASES])
def test_a_checkpoint_that_is_not_finite_is_not_converted(real, name, spoil, named):
    universal.check_source(real)
    content = load_file(real / name, mmap=False)
    spoil(content)
    replace_file(real, name, content)
    with pytest.raises(ValueError, match=f"{name}: .*{named}"):
        universal.convert(real, real.with_name("step_6.universal"))


def test_a_checkpoint_that_is_not_finite_is_not_loaded(run):
    folder = run / "checkpoints/step_3"
    content = load_file(folder / MODEL, mmap=False)
    content["0.weight"][2, 2] = math.nan
    replace_file(folder, MODEL, content)
    checkpoints = manager(run)
    with pytest.raises(ValueError, match=rf"{MODEL}: 0\.weight holds numbers that are not finite"):
        checkpoints.load(StubEngine(), checkpoints.choose("auto"))


def test_the_padding_of_zero_3_may_hold_anything():
    """Parameters of 5 and 2 numbers over 2 ranks: 3 + 3 with one of padding, 1 + 1 with none. This is rank 1."""
    shapes = [{"a": torch.Size([5]), "b": torch.Size([2])}]
    partition = [{"partition_count": 2, "partition_rank": 1}]

    def shard(flat: list[float]) -> dict[str, Any]:
        moments = {"exp_avg": torch.tensor(flat), "step": torch.tensor(3.0)}
        return {
            "optimizer_state_dict": {
                "fp32_flat_groups": [torch.tensor(flat)],
                "ds_zero_partition_groups": partition,
                "optimizer_state_dict": {"state": {0: moments}},
            }
        }

    padded = shard([1.0, 2.0, math.nan, 4.0])
    assert [(name, value.tolist()) for name, value in named_tensors(padded, shapes)] == [
        ("a", [1.0, 2.0]), ("a (exp_avg)", [1.0, 2.0]), ("b", [4.0]), ("b (exp_avg)", [4.0]),
    ]  # fmt: skip
    check_finite(padded, "x.pt", shapes=shapes)
    check_finite(padded, "x.pt")  # without shapes nothing says where the padding is
    with pytest.raises(ValueError, match="b holds"):
        check_finite(shard([1.0, 2.0, 0.0, math.inf]), "x.pt", shapes=shapes)


def test_moments_longer_than_their_masters_are_looked_at():
    """The last partition's moments are saved with the padding at its end, its masters without."""
    moment = torch.zeros(8)
    shard = {
        "single_partition_of_fp32_groups": [torch.zeros(6)],
        "param_slice_mappings": [{"a": SimpleNamespace(start=0, numel=2), "b": SimpleNamespace(start=2, numel=4)}],
        "base_optimizer_state": {"state": {0: {"exp_avg": moment, "step": torch.tensor(3.0)}}},
    }
    moment[7] = math.nan  # padding
    check_finite({"optimizer_state_dict": shard}, "a file")
    moment[5] = math.inf
    with pytest.raises(ValueError, match=r"a file: b \(exp_avg\) holds"):
        check_finite({"optimizer_state_dict": shard}, "a file")


def test_muons_momentum_of_whole_matrices_is_looked_at():
    """It is longer than the partition, and cut otherwise."""
    momentum = torch.zeros(9)
    shard = {
        "single_partition_of_fp32_groups": [torch.zeros(6)],
        "param_slice_mappings": [{"q_proj.weight": SimpleNamespace(start=0, numel=6)}],
        "base_optimizer_state": {"state": {0: {"momentum_buffer": momentum}}},
    }
    check_finite({"optimizer_state_dict": shard}, "a file")
    momentum[8] = math.nan
    with pytest.raises(ValueError, match=r"a file: q_proj\.weight \(momentum_buffer\) holds"):
        check_finite({"optimizer_state_dict": shard}, "a file")


@pytest.mark.parametrize(("nested", "name"), [({"a": [torch.ones(1)]}, r"a\[0\]"), ((torch.ones(1), {"b": 3}), r"\[0\]")])
def test_tensors_are_found_in_whatever_holds_them(nested, name):
    check_finite(nested, "a file")
    (tensor,) = (value for _, value in named_tensors(nested, None))
    tensor[0] = math.nan
    with pytest.raises(ValueError, match=f"a file: {name} holds"):
        check_finite(nested, "a file")


def test_the_last_ranks_of_zero_3_may_hold_nothing_of_a_parameter():
    """Two numbers over four ranks: rank 3 has padding alone, and behind it the whole of its next part."""
    shapes = [{"a": torch.Size([2]), "b": torch.Size([8])}]
    state = {
        "fp32_flat_groups": [torch.tensor([math.nan, 1.0, 2.0])],
        "ds_zero_partition_groups": [{"partition_count": 4, "partition_rank": 3}],
    }
    found = {name: value.tolist() for name, value in named_tensors({"optimizer_state_dict": state}, shapes)}
    assert found == {"a": [], "b": [1.0, 2.0]}


def test_every_number_of_a_long_tensor_is_looked_at():
    long = torch.zeros(CHUNK + 5)
    assert is_finite(long) and is_finite(torch.tensor([1, 2]))
    long[-1] = math.nan
    assert not is_finite(long)
