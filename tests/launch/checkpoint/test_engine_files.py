"""What one rank writes: hashed on the way, copied first where it is written later, the first error kept instead of raised."""

from __future__ import annotations

import resource
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from nursery import Nursery
from training_process import launch_ranks

from launch import manifest
from launch.checkpoint import engine_files
from launch.checkpoint.engine_files import CheckpointFiles, going_through, host_copy, state_bytes


@pytest.mark.parametrize("later", [False, True])
def test_a_file_holds_the_state_of_when_it_was_saved(tmp_path: Path, later: bool) -> None:
    files = CheckpointFiles(tmp_path, name="step_1", later=later)
    weight = torch.arange(4.0)
    files.save({"w": weight, "view": weight[:2]}, str(tmp_path / "." / "x.pt"))
    files.write("note", b"text")
    weight.fill_(-1)  # training goes on
    records = files.flush()
    assert set(records) == {"x.pt", "note"} and not files._waiting, "a copy of the state, which is as large as it"
    manifest.check_files(tmp_path, records, records)
    assert files.load(str(tmp_path / "x.pt"))["w"].tolist() == [0, 1, 2, 3]


def test_a_copy_shares_nothing_and_is_compact() -> None:
    weight = torch.arange(10.0)
    scaler = DynamicLossScaler(8.0, 1000, 1.0, 2, False)
    state = {"view": weight[2:4], "list": [weight], "tuple": (weight, 3), "flag": True, "scaler": scaler}
    copied = host_copy(state)
    weight.zero_()
    scaler.cur_scale = 4.0  # which it keeps outside of tensors
    assert copied["scaler"].cur_scale == 8.0
    assert copied["view"].tolist() == [2, 3] and copied["view"].untyped_storage().nbytes() == 8
    assert copied["list"][0][9] == 9 and isinstance(copied["tuple"], tuple) and copied["flag"] is True


def test_the_size_of_a_save_is_of_masters_moments_and_weights() -> None:
    """Under ZeRO the masters are no weights of the module. By formula: a disk that is too small is seen before a save, and before
    the first step, when the optimizer keeps nothing yet."""
    module = torch.nn.Linear(10, 3, dtype=torch.bfloat16)
    master = torch.nn.Parameter(torch.zeros(33))
    optimizer = torch.optim.AdamW([master])
    engine: Any = SimpleNamespace(module=module, optimizer=optimizer, global_rank=0, zero_optimization_stage=lambda: 2)
    assert state_bytes(engine) == 33 * (4 + 4 + 4 + 2)
    optimizer.state[master] = {"momentum_buffer": torch.zeros(33, dtype=torch.bfloat16), "step": 3}
    assert state_bytes(engine) == 33 * (4 + 2 + 2)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_weight_that_many_ranks_have_is_written_once(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 ranks, eight of which share the experts: counted on each, the estimate is far too large, and a run is refused for it."""
    module = torch.nn.ParameterDict({"dense": torch.zeros(7), "expert": torch.zeros(11)})
    module.expert.allreduce, module.expert.group_name = False, "ep_size_8"
    module["tied"] = module.dense
    optimizer = torch.optim.AdamW(list(module.parameters()) if stage == 0 else [torch.nn.Parameter(torch.zeros(5))])
    if stage == 3:  # which empties its groups
        optimizer.fp32_partitioned_groups_flat = optimizer.param_groups[0].pop("params")  # type: ignore[attr-defined]
        optimizer.param_groups[0]["params"] = []
    engine: Any = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: stage)
    monkeypatch.setattr(engine_files.groups, "_get_max_expert_size_name", lambda: "ep_size_8")
    monkeypatch.setattr(engine_files.groups, "_get_expert_data_parallel_rank", lambda name: engine.global_rank // int(name[8:]))
    total = 0
    for engine.global_rank in range(512):
        total += state_bytes(engine)
    weights = 0 if stage == 3 else 4 * (2 * 7 + 8 * 11)
    assert total == weights + ((8 + 1) * 4 * 2 * (7 + 11) if stage == 0 else 512 * 4 * 3 * 5)


def test_a_save_takes_what_was_expected(nursery: Nursery, tmp_path: Path) -> None:
    kinds = [(0, "float32", 1, "AdamW"), (2, "bfloat16", 2, "AdamW"), (3, "bfloat16", 1, "AdamW")]
    for name, (before, expected, written) in launch_ranks(nursery, 2, "sizes", folder=tmp_path, kinds=kinds).items():
        assert 1.0 <= 1.05 * expected / written <= 1.2 and 1.0 <= 1.05 * before / written <= 1.2, name


def test_the_first_error_is_kept_for_the_end(tmp_path: Path) -> None:
    """Nothing may be raised between DeepSpeed's barriers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    files = CheckpointFiles(tmp_path, name="step_1")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        files.save({"w": torch.zeros(10_000)}, str(tmp_path / "x.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    files.save({"w": torch.zeros(1)}, str(tmp_path / "y.pt"))
    assert not (tmp_path / "y.pt").exists(), "what comes after it is in vain"
    with pytest.raises(ValueError, match=r"writing step_1 failed: .*File too large"):
        files.flush()


def test_a_fault_of_the_program_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports both as the same; without a write that failed nothing would say that a file is missing."""

    def fail(*_: Any) -> None:
        raise RuntimeError("cannot be pickled")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        CheckpointFiles(tmp_path, name="step_1").save({"w": torch.ones(1)}, str(tmp_path / "x.pt"))


def test_under_zero_3_the_optimizers_file_is_looked_at_by_the_models_shapes(tmp_path: Path) -> None:
    """DeepSpeed reads the model's before; without them nothing tells numbers from padding."""
    state = {
        "fp32_flat_groups": [torch.tensor([1.0, torch.nan, 2.0, torch.nan])],
        "ds_zero_partition_groups": [{"partition_count": 2, "partition_rank": 1}],
    }
    torch.save({"optimizer_state_dict": state}, tmp_path / "optim.pt")
    for sizes, named in (([3, 4], "b"), ([3, 2], "")):
        shapes = [{name: torch.Size([size]) for name, size in zip("ab", sizes, strict=True)}]
        torch.save({"param_shapes": shapes}, tmp_path / "model.pt")
        files = CheckpointFiles(tmp_path, name="step_1")
        files.load(str(tmp_path / "model.pt"))
        with pytest.raises(ValueError, match=f"{named} holds numbers that are not finite") if named else nullcontext():
            files.load(str(tmp_path / "optim.pt"))


def test_the_engine_writes_through_us_and_nothing_beside(tmp_path: Path) -> None:
    """DeepSpeed copies a script past its checkpoint engine, where a full disk would end rank 0 between barriers."""

    class Engine:
        checkpoint_engine: Any = "theirs"

        def _copy_recovery_script(self, save_path: str) -> None:
            raise OSError(28, "No space left on device")

    engine, files = Engine(), CheckpointFiles(tmp_path, name="step_1")
    with going_through(files, engine):
        assert engine.checkpoint_engine is files
        engine._copy_recovery_script(str(tmp_path))
    assert engine.checkpoint_engine == "theirs"
    with pytest.raises(OSError, match="No space"):
        engine._copy_recovery_script(str(tmp_path))


def test_memory_that_flips_a_bit_before_it_is_written_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the copy, while another file is written: its checksum alone would call it whole for ever."""
    files = CheckpointFiles(tmp_path, name="step_1", later=True)
    files.save({"w": torch.zeros(4, dtype=torch.bfloat16)}, str(tmp_path / "a.pt"))
    files.save({"w": [torch.arange(4), torch.tensor(1.0)]}, str(tmp_path / "b.pt"))
    assert files._waiting is not None
    copied, keep = files._waiting[1][1]["w"][0], CheckpointFiles._keep

    def flip(self: CheckpointFiles, path: Path, content: Any) -> None:
        keep(self, path, content)
        if path.name == "a.pt":
            copied[2] ^= 1 << 40

    monkeypatch.setattr(CheckpointFiles, "_keep", flip)
    with pytest.raises(ValueError, match=r"writing step_1 failed: .*b\.pt: this host's memory changed while it was written"):
        files.flush()
