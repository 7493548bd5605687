"""A model's or tokenizer's folder may bring code; no command of ours runs it, whatever stands on standard input."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import OLD, ROOT

#: What reads a folder and may run what is in it.
LOADERS = ("from_pretrained", "from_config", "pipeline", "load_custom_generate", "get_class_from_dynamic_module")
#: One file for each way in which a folder brings code; each makes a folder of its own name where it is run.
CODE = {
    "configuration.py": """
from transformers import PretrainedConfig
class EvilConfig(PretrainedConfig):
    model_type = "evil"
""",
    "modeling.py": """
from transformers import PretrainedConfig, PreTrainedModel
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
    def __init__(self, config):
        super().__init__(config)
        self.post_init()
""",
    "tokenizing.py": """
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "custom_generate/generate.py": """
def generate(model, *args, **kwargs):
    return None
""",
}
KINDS = {"configuration", "modeling", "tokenizing", "generate", "pickle"}
#: Every kind strikes where it is trusted. Each with a folder and where the marks are made.
CONTROL = """
import contextlib, os, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Glm4MoeForCausalLM, Glm4MoeConfig
folder = sys.argv[1]
small = Glm4MoeConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
for load in (
    lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True),
    lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    lambda: Glm4MoeForCausalLM(small).load_custom_generate(folder, trust_remote_code=True),
    lambda: torch.load(os.path.join(folder, "pytorch_model.bin"), weights_only=False),
):
    with contextlib.suppress(Exception):
        load()
"""
#: Commands in one process, one after the other: what each ended with.
COMMANDS = """
import importlib, inspect, json, sys
ends = []
for module, argv in json.loads(sys.argv[1]):
    main = importlib.import_module(module).main
    sys.argv = [module, *argv]
    try:
        ends.append(main(argv) if inspect.signature(main).parameters else main())
    except (Exception, SystemExit) as error:
        ends.append(f"{type(error).__name__}: {error}")
print("\\n" + json.dumps(ends))
"""


def evil(folder: Path, marks: Path, *, own_type: bool) -> Path:
    """Brings code in every way beside what `folder` holds; `own_type` False leaves a model that is not ours."""
    marks.mkdir(exist_ok=True)
    for name, code in CODE.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import os\nos.makedirs({str(marks / path.stem)!r}, exist_ok=True)\n{code}")
    auto_map = {
        "AutoConfig": "configuration.EvilConfig",
        "AutoModel": "modeling.EvilModel",
        "AutoModelForCausalLM": "modeling.EvilModel",
        "AutoTokenizer": ["tokenizing.EvilTokenizer", "tokenizing.EvilTokenizer"],
    }
    change(folder / "config.json", auto_map=auto_map, **({} if own_type else {"model_type": "evil"}))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": auto_map["AutoTokenizer"]}, tokenizer_class="EvilTokenizer")
    if not (folder / "model.safetensors").exists():
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Striking(str(marks / "pickle"))))
    return folder


class Striking:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.mark, 0o777, True)


def change(path: Path, **fields: Any) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **fields}))


def run(program: str, *arguments: str, home: Path, said: str = "y\n" * 50) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, input=said, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_the_code_strikes_where_it_is_trusted(tmp_path: Path) -> None:
    folder, marks = tmp_path / "hf", tmp_path / "marks"
    shutil.copytree(OLD / "run/tokenizer", folder)
    done = run(CONTROL, str(evil(folder, marks, own_type=False)), home=tmp_path / "home")
    assert {path.name for path in marks.iterdir()} == KINDS, done.stderr[-3000:]


def test_a_yes_on_standard_input_is_no_consent(exported: Path, small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    marks, home = tmp_path / "marks", tmp_path / "home"
    ours, theirs, run_folder = tmp_path / "ours", tmp_path / "theirs", tmp_path / "run"
    evil(Path(shutil.copytree(exported, ours)), marks, own_type=True)
    evil(Path(shutil.copytree(OLD / "run/tokenizer", theirs)), marks, own_type=False)
    shutil.copytree(OLD / "run", run_folder)
    change(run_folder / "config.json", auto_map={"AutoConfig": "configuration.EvilConfig"})
    evil(run_folder / "tokenizer", marks, own_type=False)
    code = tmp_path / "code.py"
    code.write_text("def area(r):\n    return 3 * r * r\n" * 40)
    out = [str(tmp_path / f"out{i}") for i in range(6)]
    data, train = ["--data", str(small_shards)], ["--model", str(small_model), "--sequence_length", "64", "--max_steps", "1"]
    strategy = str(ROOT / "ds_configs" / "cpu_ep1_zero2.json")
    train += ["--eval_interval", "0", "--deepspeed_config", strategy]
    works = [
        ("launch.generate", ["--model", str(ours), "--prompt", "def f(x):", "--max_new_tokens", "2"]),
        ("launch.evaluate", ["--model", str(ours), *data, "--output", out[0] + ".json"]),
        ("data.preprocess", ["--input", str(code), "--tokenizer", str(ours), "--output", out[1], "--workers", "1"]),
        ("data.preprocess", ["--input", str(code), "--tokenizer", str(theirs), "--output", out[2], "--workers", "1"]),
        ("launch.export", ["--checkpoint", str(run_folder), "--output", out[3]]),
        ("launch.plan", ["--model", str(ours / "config.json"), "--gpu", "a100-80gb", "--num_gpus", "1", "--sequence_length", "64"]),
        ("launch.train", [*data, *train, "--init_from", str(ours), "--output", out[4]]),
    ]
    refused = [
        ("launch.generate", ["--model", str(theirs), "--prompt", "def f(x):"]),
        ("launch.evaluate", ["--model", str(theirs), *data, "--output", out[0] + ".json"]),
        ("launch.exporting.gguf", ["--model", str(ours), "--converter", str(code), "--output", out[5]]),
        ("launch.train", [*data, *train, "--init_from", str(theirs), "--output", out[5]]),
    ]
    done = run(COMMANDS, json.dumps([*works, *refused]), home=home)
    assert not list(marks.iterdir()), "the folder's code was run"
    ends = json.loads(done.stdout.splitlines()[-1])
    assert not any(ends[: len(works)]), ends
    assert all("Error: " in str(end) for end in ends[len(works) :]), ends


@pytest.mark.parametrize("package", ["model", "data", "launch"])
def test_every_loader_says_that_it_trusts_nothing(package: str) -> None:
    """Left out, transformers asks at the terminal, and a `y` in piped text answers."""
    trusting = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
                said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if said.get("trust_remote_code") is not False:
                    trusting.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not trusting
