"""Nothing is run out of a file: not of ours, not by DeepSpeed's own loads, not in the converter's process."""

import copyreg
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from stub_engine import MODEL, Payload, StubEngine, manager, replace_file

from data.cli import UserError
from launch.checkpoint import universal
from launch.checkpoint.converter import run_converter
from launch.checkpoint.unpickle import (
    FORCE,
    FORCE_NOT,
    expecting_sense,
    hearing_of_loads,
    load_file,
    no_code_from_files,
    save_stages_by_value,
)

KINDS = [
    "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt",
    "layer_0_expert_1_mp_rank_00_model_states.pt",
    "buffers.pt",
]


def hide_a_payload(checkpoint: Path, name: str, marker: Path) -> None:
    """In a file that is otherwise as it was; and the payload does strike where nothing holds it back."""
    content = torch.load(checkpoint / name, map_location="cpu", weights_only=False)
    replace_file(checkpoint, name, {**content, "x": Payload(marker)})
    torch.load(checkpoint / name, map_location="cpu", weights_only=False)
    assert marker.is_dir(), "the payload was to strike here"
    marker.rmdir()


def test_every_load_is_heard_of_and_only_while_it_is_wanted(tmp_path):
    told, theirs = [], torch.load
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(UserError), hearing_of_loads(lambda: told.append(1)):
        assert torch.load(tmp_path / "x.pt", weights_only=True).keys() == load_file(tmp_path / "x.pt").keys() == {"w"}
        raise UserError("x")
    assert len(told) == 2 and torch.load is theirs


@pytest.mark.parametrize("name", [MODEL, "buffers.pt", "rng_00000.pt"])
def test_code_is_not_run_by_a_plain_load(run, name):
    folder, marker = run / "checkpoints/step_3", run / "struck"
    hide_a_payload(folder, name, marker)
    checkpoints = manager(run)
    with pytest.raises(ValueError, match=f"{name}.*holds something other than tensors"):
        checkpoints.load(StubEngine(), checkpoints.choose("auto"))
    assert not marker.exists()


@pytest.mark.parametrize("name", KINDS)
def test_code_is_refused_before_a_conversion_starts(real, tmp_path, name):
    hide_a_payload(real, name, tmp_path / "struck")
    with pytest.raises(ValueError, match=f"{name}.*holds something other than tensors"):
        universal.convert(real, real.with_name("step_6.universal"))
    assert not (tmp_path / "struck").exists()
    assert [p.name for p in real.parent.iterdir()] == ["step_6"]


def test_the_converter_itself_runs_nothing(real, tmp_path):
    """As if the file had been changed after it was checked."""
    hide_a_payload(real, KINDS[0], tmp_path / "struck")
    with pytest.raises(ValueError, match="could not be converted"):
        run_converter(real, tmp_path / "out", lambda: None)
    assert not (tmp_path / "struck").exists()


def test_loads_that_ask_for_everything_are_restricted_while_ours_last(tmp_path, monkeypatch):
    """As DeepSpeed's loaders of a conversion ask, some thirty of them; somebody may also have planted the conversion."""
    monkeypatch.setenv(FORCE_NOT, "1")  # a user's own setting, with which torch would refuse to load anything here
    path, marker = tmp_path / "x.pt", tmp_path / "struck"
    torch.save({"x": Payload(marker)}, path)
    with no_code_from_files(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=False)
    assert not marker.exists()
    assert (os.environ.get(FORCE), os.environ.get(FORCE_NOT)) == (None, "1"), "the environment is as it was"
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload was to strike outside"


@pytest.mark.parametrize("error", [KeyError("a"), IndexError("b"), TypeError(), AttributeError("c"), ValueError("d")], ids=repr)
def test_content_of_another_shape_is_a_sentence(error):
    said = r"^step_3 does not hold what a checkpoint holds, though its checksums are right"
    with pytest.raises(UserError, match=said), expecting_sense(Path("step_3")):
        raise error


@pytest.mark.parametrize("error", [UserError("a sentence"), RuntimeError("a fault")], ids=repr)
def test_a_sentence_or_a_fault_of_the_program_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, expecting_sense(Path("step_3")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x02." * 9])
def test_what_is_no_such_file_is_a_sentence(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt cannot be read"):
        load_file(path)


def test_a_folder_whose_name_is_no_text_is_read(tmp_path):
    """torch maps a file by its name alone, which it wants as text."""
    (folder := tmp_path / os.fsdecode(b"run\xff")).mkdir()
    with open(folder / "x.pt", "wb") as file:
        torch.save({"w": torch.ones(2)}, file)
    assert load_file(folder / "x.pt")["w"].tolist() == [1, 1]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=["disk", "memory"])
def test_a_disk_or_memory_that_fails_says_nothing_about_the_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as caught:
        load_file(tmp_path / "x.pt")
    assert caught.value is error


def test_a_stage_is_saved_so_that_it_is_read_by_every_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 pickle an enum's member as a call of getattr."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.delitem(copyreg.dispatch_table, ZeroStageEnum, raising=False)
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda self, _protocol: (getattr, (type(self), self._name_)))
    content = {"zero_stage": ZeroStageEnum.gradients}
    assert b"getattr" in pickle.dumps(content)
    save_stages_by_value()
    torch.save(content, tmp_path / "a.pt")
    assert load_file(tmp_path / "a.pt") == content
    copyreg.dispatch_table.pop(ZeroStageEnum)
