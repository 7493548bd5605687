"""An exported folder may bring code (`auto_map`); no command of ours runs it, whatever stands on standard input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

OLD_TOKENIZER = ROOT / "tests" / "fixtures" / "before_the_move" / "run" / "tokenizer"
CODE = """
import os
from transformers import PretrainedConfig, PreTrainedModel
os.mkdir({marker!r})
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
"""
CONTROL = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
#: With the tokenizer's own `auto_map` as well.
TOKENIZER_MAP = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    folder, marker = tmp_path / "hf", tmp_path / "struck"
    shutil.copytree(OLD_TOKENIZER, folder)
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": TOKENIZER_MAP}))
    return folder, marker


def run(command: list[str], tmp_path: Path, said: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, input=said, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_code_strikes_where_it_is_trusted(evil: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marker = evil
    run([sys.executable, "-c", CONTROL, str(folder)], tmp_path, "")
    assert marker.is_dir()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_yes_on_standard_input_is_no_consent(evil: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    folder, marker = evil
    more = {"generate": ["--prompt", "-"], "evaluate": ["--data", str(folder), "--output", str(tmp_path / "e.json")]}[command]
    done = run([sys.executable, f"launch/{command}.py", "--model", str(folder), *more], tmp_path, "y\ny\ndef f(x):\n")
    assert not marker.exists(), "the folder's code was run"
    assert done.returncode != 0
