"""The model card says what the run's files say."""

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support import OLD, ROOT

from launch.exporting.card import fim_rate, loading, logged, model_card, without_folders
from launch.exporting.formats import build, exported_config
from launch.exporting.source import model_config, weights
from model import MoEGPTConfig


def test_card_of_a_real_run(checkpoint: Path) -> None:
    config = exported_config(model_config(checkpoint), "moe_gpt")
    card = model_card(build(config, weights(checkpoint), "float32"), checkpoint)
    assert card.startswith("---\nlibrary_name: transformers\n") and "trust_remote_code=True" in card
    loss = "validation loss 5.7355 nats a token, 6.0553 bits per byte"
    for line in ("6 steps, 1,536 tokens", loss, "training loss at the last logged step 5.7388"):
        assert f"- {line}" in card
    assert "best validation loss" not in card, "it is this checkpoint's"
    # Embedding and head 2 x 320 x 8, last norm 8; a layer: attention 192, norms 16 + 8, sinks 2, router 32, an expert 3 x 8 x 8.
    layer, expert = 192 + 24 + 2 + 32, 192
    everything, used = (5128 + 2 * (layer + (number + 1) * expert) for number in (4, 2))
    assert (
        f"{everything:,} parameters, of which a token uses {used:,}: 2 layers, 4 experts of which a token uses 2, and 1 that"
        in card
    )
    assert "Trained on sequences of 32 tokens; positions up to 64." in card and "\nlicense: unknown\n" in card
    assert "## License\n\nNone was chosen" in card and "Apache License 2.0" in card and "`eager` alone" in card
    assert "`eager`" not in loading(exported_config(MoEGPTConfig.preset("tiny", attention_sinks=False), "moe_gpt"))
    assert "--max_steps 12" in card and "b258fec79a54" in card and "## Limits" in card and "## Intended use" in card


def card_of(checkpoint: Path) -> str:
    return model_card(build(exported_config(model_config(checkpoint), "moe_gpt"), weights(checkpoint), "float32"), checkpoint)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_loss_is_this_checkpoints_and_can_be_repeated(checkpoint: Path) -> None:
    """The best of the run may be an earlier step's, whose weights these are not."""
    run = checkpoint.parents[1]
    edit(run / "config.json", validation={"samples": 1054, "sequence_length": 32})
    edit(checkpoint / "state.json", best_loss=4.5, best_step=3)
    rows = [{"step": 1, "val_loss": 4.5}, {"step": 3, "val_loss": 4.5}, {"step": 6, "val_loss": 5.25, "val_bits_per_byte": 2.5}]
    rows.append({"step": 9, "val_loss": 4.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = card_of(checkpoint)
    first = "on the validation split's first 16 samples of 32 tokens"  # 2 batches of 8
    assert f"- validation loss 5.2500 nats a token, 2.5000 bits per byte, {first}\n" in card
    assert "- best validation loss of the run up to here 4.5000 nats a token at step 3\n" in card and "4.0000" not in card
    edit(run / "config.json", validation={"samples": 11, "sequence_length": 32})
    assert "first 11 samples" in card_of(checkpoint)
    edit(checkpoint / "state.json", extra={"judged_on": {"samples": 8, "fingerprint": "abc"}})
    assert "first 8 samples" in card_of(checkpoint), "the run has other --eval_batches since"
    (run / "metrics.jsonl").unlink()
    assert "- best validation loss of the run up to here 4.5000 nats a token at step 3\n" in card_of(checkpoint)
    edit(checkpoint / "state.json", best_step=None)  # an older version's
    assert "- best validation loss of the run up to here 4.5000 nats a token\n" in card_of(checkpoint)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert "4.5000 nats a token at step 3\n" in card_of(checkpoint), "one row alone has it"


def test_a_long_run_s_metrics_are_never_held(tmp_path: Path) -> None:
    """Over 1 GiB they were passed over without a word, and a card had no losses."""
    load = {"expert_load": [[1.0] * 64] * 60}
    rows = [row for step in range(1, 201) for row in ({"step": step, "loss": 9.0 - step / 100}, {"step": step, **load})]
    rows += [{"step": 200, "val_loss": 7.5}, {"step": 201, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "loss"')
    assert (tmp_path / "metrics.jsonl").stat().st_size > 3_000_000
    tracemalloc.start()
    try:
        found = logged(tmp_path / "checkpoints/step_200", {"step": 200})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert found == ({200: {"step": 200, "val_loss": 7.5}}, 7.0)


def test_metrics_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    """The weights are there all the same; the export ended in a traceback."""
    (tmp_path / "metrics.jsonl").symlink_to("/proc/self/mem")  # an error at the first byte, for root as well
    assert logged(tmp_path / "checkpoints/step_200", {"step": 200}) == ({}, None)


def test_the_context_is_what_it_was_trained_on_and_how_far_it_reaches(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())["identity"]
    rope = {**state["model"]["rope_parameters"], "factor": 2.0, "original_max_position_embeddings": 32}
    edit(checkpoint / "state.json", identity={**state, "model": {**state["model"], "rope_parameters": rope}})
    (checkpoint.parents[1] / "config.json").unlink()
    assert "Trained on sequences of 32 tokens; positions up to 64 (yarn, factor 2, from 32)." in card_of(checkpoint)


@pytest.mark.parametrize(("rate", "said"), [(0.5, True), (0.0, False), (None, False)])
def test_filling_in_is_for_models_that_were_trained_to(checkpoint: Path, rate: float | None, said: bool) -> None:
    run = checkpoint.parents[1]
    if rate is not None:
        (run / "shards").mkdir()
        (run / "shards/manifest.json").write_text(json.dumps({"arguments": {"fim_rate": rate}}))
        edit(run / "config.json", sources={"sources": [str(run / "shards")]})
    card = card_of(checkpoint)
    assert ("Completing and filling in source code, for" in card) == said
    assert ("It was not trained to fill in" in card) == (rate == 0.0)


def test_where_things_lie_on_the_host_stays_there(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    shards = run / "secret place" / "shards"
    shards.mkdir(parents=True)
    (shards / "manifest.json").write_text(json.dumps({"arguments": {}, "splits": {"train": {"documents": 4}}}))
    command = [str(run / "launch/train.py"), "--data", f"{shards}:0.5", f"--output={shards}/", "--model", "~me/model.json"]
    edit(
        run / "config.json",
        command=command,
        sources={"sources": [str(shards)], "tokens": [7]},
    )
    card = card_of(checkpoint)
    assert "`train.py --data shards:0.5 --output=shards --model model.json`" in card
    assert "- shards: 7 tokens\n" in card and "- shards: 4 documents" in card and str(run) not in card and "secret" not in card


@pytest.mark.parametrize("word", ["", "/", "x", "a/b", "../w/run", "https://h/a/b", "1e-3", "--flag", "org/name:0.3", "a=b/c"])
def test_what_is_no_absolute_path_stays(word: str) -> None:
    assert without_folders(word) == word


def test_data_and_licenses_where_the_shards_still_lie(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checkpoint.parent.parent / "config.json"
    shards = checkpoint.parent.parent / "shards"
    shards.mkdir()
    manifest = json.loads((OLD / "tokens/manifest.json").read_text())
    manifest["arguments"] |= {"licenses": ["mit", "apache-2.0"], "fim_rate": 0.5}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    edit(run, sources={"sources": [str(shards)]})
    assert "4 documents, licenses kept: mit, apache-2.0, fill-in-the-middle rate 0.5" in card_of(checkpoint)
    assert fim_rate(checkpoint) == 0.5
    monkeypatch.chdir(checkpoint.parent)
    assert fim_rate(Path("step_6")) == 0.5  # `--checkpoint step_6`, given in the folder itself


def test_nothing_is_claimed_that_is_not_recorded(checkpoint: Path) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (checkpoint.parent.parent / name).unlink()
    config = exported_config(model_config(checkpoint), "moe_gpt")
    card = model_card(build(config, weights(checkpoint), "float32"), checkpoint)
    assert "- not recorded" in card and "command:" not in card and "on the validation" not in card and fim_rate(checkpoint) is None


def test_the_cards_code_runs_as_it_is_printed(checkpoint: Path, tmp_path: Path) -> None:
    """In an interpreter that knows nothing of ours, with nobody at the keyboard: transformers asks whether code may run."""
    folder, home = tmp_path / "hf", {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "launch/export.py", "--checkpoint", str(checkpoint), "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    loading = (folder / "README.md").read_text().partition("## Loading\n\n")[2]
    code = textwrap.dedent(loading.partition("\n\n")[2]).replace("this folder", str(folder))
    run = [sys.executable, "-I", "-c", code]
    done = subprocess.run(run, env=os.environ | home, cwd=tmp_path, input="", capture_output=True, text=True, check=False)
    assert "set_seed(0)" in code, "it samples, and a reader is to see the same"
    assert done.returncode == 0 and done.stdout.startswith("def fibonacci(n):"), done.stdout + done.stderr[-3000:]
    assert "custom code" not in done.stdout + done.stderr and "instantiate a model of type" not in done.stderr
