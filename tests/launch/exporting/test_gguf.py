"""The wrapper around llama.cpp's converter: what it answers for, and what it refuses. `make served` runs the real one."""

import json
import sys
from pathlib import Path

import pytest

from data.cli import UserError
from launch.exporting import gguf

CONVERTER = """
import json, sys
class TextModel:
    def _set_vocab_gpt2(self): self.said.append("plain " + self.get_vocab_base_pre(object()))
    def _set_vocab_glm(self): raise SystemExit("wants [gMASK]")
    def get_vocab_base_pre(self, tokenizer): raise SystemExit("BPE pre-tokenizer was not recognized")
class Glm4MoeModel(TextModel):
    said = []
    def set_vocab(self): return self._set_vocab_glm()
def main():
    Glm4MoeModel().set_vocab()
    open(sys.argv[sys.argv.index("--outfile") + 1], "w").write(json.dumps([Glm4MoeModel.said, sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)


def folder(path: Path, model_type: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_the_tokenizers_questions_are_answered(tmp_path: Path) -> None:
    converter, out = tmp_path / "convert_hf_to_gguf.py", tmp_path / "model.gguf"
    converter.write_text(CONVERTER)
    model = folder(tmp_path / "hf", "glm4_moe")
    gguf.main(["--model", str(model), "--converter", str(converter), "--output", str(out), "--outtype", "f32"])
    said, given = json.loads(out.read_text())
    assert said == ["plain starcoder"] and given == [str(model), "--outfile", str(out), "--outtype", "f32"]


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no architecture with this model's sinks"):
        gguf.check_model(folder(tmp_path / "hf", "moe_gpt"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        gguf.check_model(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        gguf.load_converter(tmp_path / "none.py")
    (tmp_path / "other.py").write_text("class TextModel: pass\n")
    with pytest.raises(UserError, match="another version of the converter"):
        gguf.answer_for_the_tokenizer(gguf.load_converter(tmp_path / "other.py"), "starcoder")
