"""What an export reads: never what hangs, fills the memory or is not finite; each is one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_engine import replace_file

from data.cli import NotFound, UserError
from launch import manifest
from launch.checkpoint.folder import CheckpointFolder
from launch.checkpoint.unpickle import save_stages_by_value
from launch.exporting.card import model_card
from launch.exporting.formats import build, exported_config
from launch.exporting.source import find_checkpoint, model_config, verify, weights

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


def change(checkpoint: Path, name: str, how: Callable[[Any], Any]) -> None:
    """With right sums: whoever can change a file can change the manifest."""
    content = torch.load(checkpoint / name, map_location="cpu", weights_only=False)
    changed = how(content)
    save_stages_by_value()
    replace_file(checkpoint, name, content if changed is None else changed)
    verify(checkpoint)


def test_nan_in_a_master_weight_is_refused_by_the_parameters_name(checkpoint: Path) -> None:
    def spoil(content: Any) -> None:
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][3] = float("nan")

    change(checkpoint, OPTIMIZER, spoil)
    with pytest.raises(UserError, match=r"step_6: model\.embed_tokens\.weight holds numbers that are not finite"):
        list(weights(checkpoint))


def test_infinity_in_a_buffer_is_refused_by_its_exported_name(checkpoint: Path) -> None:
    def spoil(content: Any) -> None:
        next(value for value in content.values() if value.is_floating_point()).view(-1)[0] = float("inf")

    change(checkpoint, "buffers.pt", spoil)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate\.e_score_correction_bias holds numbers that are not"):
        list(weights(checkpoint))


NONSENSE: list[tuple[str, Callable[[Any], Any]]] = [
    ("buffers.pt", lambda content: [1, 2]),
    ("buffers.pt", lambda content: {"a": "b"}),
    (OPTIMIZER, lambda content: [1, 2]),
    (OPTIMIZER, lambda content: content.pop("optimizer_state_dict") and None),
    (OPTIMIZER, lambda content: content["optimizer_state_dict"].pop("param_slice_mappings") and None),
    (MODEL, lambda content: content.pop("param_shapes") and None),
    (MODEL, lambda content: content.update(ds_autoep_layers=[])),
    (MODEL, lambda content: content.update(param_shapes=7)),
]


@pytest.mark.parametrize(("name", "how"), NONSENSE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(NONSENSE)])
def test_content_of_another_shape_is_a_sentence(checkpoint: Path, name: str, how: Callable[[Any], Any]) -> None:
    change(checkpoint, name, how)
    with pytest.raises(UserError, match="step_6"):
        build(exported_config(model_config(checkpoint), "moe_gpt"), weights(checkpoint), "float32")


def test_a_file_that_no_manifest_lists_is_not_read(checkpoint: Path) -> None:
    shutil.copy(checkpoint / OPTIMIZER, checkpoint / OPTIMIZER.replace("rank_0", "rank_2"))
    with pytest.raises(manifest.DamagedError, match=r"rank_2.* is not listed in manifest\.json"):
        verify(checkpoint)
    assert manifest.find_manifest(checkpoint)[0] is None, "a resume passes it over"


MODELS: list[Any] = ["x", 3, {"hidden_size": -4}, {"vocab_size": 1 << 60}]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_model_without_sense_is_a_sentence(checkpoint: Path, model: Any) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"]["model"] = {**state["identity"]["model"], **model} if isinstance(model, dict) else model
    replace_file(checkpoint, "state.json", json.dumps(state).encode())
    with pytest.raises(UserError):
        build(exported_config(model_config(checkpoint), "moe_gpt"), weights(checkpoint), "float32")


POINTERS: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "fifo": os.mkfifo,
    "long": lambda path: path.write_text("step_" + "9" * 5000),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\0"),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_a_pointer_that_is_none_neither_hangs_nor_fills_the_memory(checkpoint: Path, kind: str) -> None:
    (checkpoint.parent / "latest").unlink()
    POINTERS[kind](checkpoint.parent / "latest")
    with pytest.raises(NotFound, match="it has step_6; name one with --tag"):
        find_checkpoint(checkpoint.parents[1], "latest")


@pytest.mark.parametrize("kind", ["huge", "device", "fifo"])
def test_a_manifest_that_is_none_is_refused(checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "RETRY_AFTER", ())
    (checkpoint / "manifest.json").unlink()
    POINTERS[kind](checkpoint / "manifest.json")
    with pytest.raises(manifest.UnreadableError, match="not a regular file of at most"):
        verify(checkpoint)


def test_a_tag_names_its_own_checkpoint(tmp_path: Path) -> None:
    """The best, the latest and one by its step are three, and a path to one needs no tag."""
    held = CheckpointFolder(tmp_path / "checkpoints")
    for step in (3, 5, 12):
        (held.path / f"step_{step}").mkdir(parents=True)
    held.point("latest", "step_5")
    held.point("best", "step_3")
    for where in (tmp_path, held.path):
        assert [find_checkpoint(where, tag).name for tag in ("latest", "best", "step_12")] == ["step_5", "step_3", "step_12"]
        assert find_checkpoint(where, None).name == "step_5"
    assert [find_checkpoint(held.path / "step_3", tag).name for tag in (None, "step_3", "best")] == ["step_3"] * 3
    for tag in ("step_5", "latest", "step_7", "second", ""):
        with pytest.raises(UserError, match=f"--checkpoint .*step_3 and --tag {tag} do not name the same checkpoint"):
            find_checkpoint(held.path / "step_3", tag)
    (held.path / "best").unlink()
    with pytest.raises(NotFound, match=r"has no checkpoint 'best': it has step_3, step_5, step_12"):
        find_checkpoint(tmp_path, "best")


SECRETS = ("hf_" + "a" * 34, "me:pw@host", "S3CRET")
LINES = b'{"loss": 1.5, "step": 2}\n{"loss": "x"}\n{"step": ' + b"[" * 100_000 + b"\n[]\n7\n\xff\n"


def test_what_a_person_edited_stops_no_card_and_no_secret_comes_into_it(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    model = build(exported_config(model_config(checkpoint), "moe_gpt"), weights(checkpoint), "float32")
    (run / "metrics.jsonl").write_bytes(LINES)
    for about in (
        "[" * 100_000,
        '{"arguments": [1], "sources": 3, "command": 5, "versions": [2]}',
        '{"sources": {"sources": [[]]}}',
    ):
        (run / "config.json").write_text(about)
        assert "training loss at the last logged step 1.5000" in model_card(model, checkpoint)
    command = ["train.py", "--model", SECRETS[0], "--data", f"https://{SECRETS[1]}/x", "--x", f"https://h/p?token={SECRETS[2]}"]
    sources = {"sources": [f"https://{SECRETS[1]}/x"], "tokens": [5]}
    (run / "config.json").write_text(json.dumps({"command": command, "sources": sources}))
    card = model_card(model, checkpoint)
    assert card.count("[redacted]") == 4 and not any(secret in card for secret in SECRETS)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert "- not recorded" in model_card(model, checkpoint)


def test_a_secret_in_the_users_model_file_is_not_exported(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"]["model"] |= {"hub_token": "S3CRET", "source": f"https://h/{SECRETS[0]}"}
    replace_file(checkpoint, "state.json", json.dumps(state).encode())
    for said in (exported_config(model_config(checkpoint), "moe_gpt").to_json_string(), str(model_config(checkpoint))):
        assert not any(secret in said for secret in SECRETS)


def test_another_runs_checkpoint_is_not_exported_with_this_ones_tokenizer(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    identity = json.loads((checkpoint / "state.json").read_text())["identity"]
    (run / "config.json").write_text(json.dumps({**identity, "host": "a"}))
    model_config(checkpoint)
    (run / "config.json").write_text(json.dumps({**identity, "seed": 99}))
    with pytest.raises(UserError, match=r"step_\d+ belongs to another run than .*config\.json: seed: 99 -> \d+"):
        model_config(checkpoint)
