"""The model card says what the run's files say."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import ROOT

from launch.exporting.card import fim_rate, model_card
from launch.exporting.formats import build, exported_config
from launch.exporting.source import model_config, weights

OLD = Path(__file__).resolve().parents[2] / "fixtures" / "before_the_move"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run/checkpoints/step_6"


def test_card_of_a_real_run(checkpoint: Path) -> None:
    config = exported_config(model_config(checkpoint), "moe_gpt")
    card = model_card(build(config, weights(checkpoint), "float32"), checkpoint)
    assert card.startswith("---\nlibrary_name: transformers\n") and "trust_remote_code=True" in card
    for line in ("6 steps, 1,536 tokens", "best validation loss 5.7355", "training loss at the last logged step 5.7388"):
        assert f"- {line}" in card
    assert "--max_steps 12" in card and "b258fec79a54" in card and "## Limits" in card and "## Intended use" in card


def test_data_and_licenses_where_the_shards_still_lie(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checkpoint.parent.parent / "config.json"
    shards = checkpoint.parent.parent / "shards"
    shards.mkdir()
    manifest = json.loads((OLD / "tokens/manifest.json").read_text())
    manifest["arguments"] |= {"licenses": ["mit", "apache-2.0"], "fim_rate": 0.5}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    about = json.loads(run.read_text())
    for named in (str(shards), f"{shards}:0.3"):
        about["arguments"]["data"] = [named]
        run.write_text(json.dumps(about))
        config = exported_config(model_config(checkpoint), "moe_gpt")
        card = model_card(build(config, weights(checkpoint), "float32"), checkpoint)
        assert "4 documents, licenses kept: mit, apache-2.0, fill-in-the-middle rate 0.5" in card
        assert fim_rate(checkpoint) == 0.5
    monkeypatch.chdir(checkpoint.parent)
    assert fim_rate(Path("step_6")) == 0.5  # `--checkpoint step_6`, given in the folder itself


def test_nothing_is_claimed_that_is_not_recorded(checkpoint: Path) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (checkpoint.parent.parent / name).unlink()
    config = exported_config(model_config(checkpoint), "moe_gpt")
    card = model_card(build(config, weights(checkpoint), "float32"), checkpoint)
    assert "- not recorded" in card and "command" not in card and fim_rate(checkpoint) is None


def test_the_cards_code_runs_as_it_is_printed(checkpoint: Path, tmp_path: Path) -> None:
    """In an interpreter that knows nothing of ours, with nobody at the keyboard: transformers asks whether code may run."""
    folder, home = tmp_path / "hf", {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "launch/export.py", "--checkpoint", str(checkpoint), "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code = textwrap.dedent((folder / "README.md").read_text().partition("## Loading\n\n")[2]).replace("this folder", str(folder))
    run = [sys.executable, "-I", "-c", code]
    done = subprocess.run(run, env=os.environ | home, cwd=tmp_path, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("def fibonacci(n):"), done.stdout + done.stderr[-3000:]
    assert "custom code" not in done.stdout + done.stderr and "instantiate a model of type" not in done.stderr
