"""The wrapper around llama.cpp's converter: what it answers for, and what it refuses. `make served` runs the real one."""

import json
import sys
from pathlib import Path

import pytest

from data.cli import UserError
from launch.exporting import gguf

CONVERTER = """
import argparse, json, os, sys
def parse_args():
    p = argparse.ArgumentParser("convert_hf_to_gguf.py")
    p.add_argument("model")
    p.add_argument("--outfile")
    p.add_argument("--outtype", choices=["f32", "bf16"])
    return p.parse_args()
class TextModel:
    def _set_vocab_gpt2(self): self.said.append("plain " + self.get_vocab_base_pre(object()))
    def _set_vocab_glm(self): raise SystemExit("wants [gMASK]")
    def get_vocab_base_pre(self, tokenizer): raise SystemExit("BPE pre-tokenizer was not recognized")
class Glm4MoeModel(TextModel):
    said = []
    def set_vocab(self): return self._set_vocab_glm()
def main():
    Glm4MoeModel().set_vocab()
    args = parse_args()
    file = open(args.outfile.format(ftype=args.outtype), "w")
    file.write("[")
    file.flush()
    if os.path.exists(args.model + "/broken"):
        raise ValueError("Can not map tensor")
    file.write(json.dumps(Glm4MoeModel.said + [args.model, args.outtype])[1:])
    file.close()
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
    assert json.loads(out.read_text()) == ["plain starcoder", str(model), "f32"]


@pytest.mark.parametrize("name", ["model.gguf", "model-{ftype}.gguf"])
def test_the_file_has_its_name_once_it_is_whole(name: str, tmp_path: Path) -> None:
    converter, out, model = tmp_path / "convert_hf_to_gguf.py", tmp_path / "out" / name, folder(tmp_path / "hf", "glm4_moe")
    converter.write_text(CONVERTER)
    out.parent.mkdir()
    out.write_text("the last one")
    command = ["--model", str(model), "--converter", str(converter), "--output", str(out)]
    (model / "broken").touch()
    with pytest.raises(ValueError, match="Can not map tensor"):
        gguf.main(command)
    assert out.read_text() == "the last one" and list(out.parent.iterdir()) == [out]
    (model / "broken").unlink()
    gguf.main(command)
    assert json.loads(out.read_text())[-1] == "bf16" and list(out.parent.iterdir()) == [out]


def test_mistakes_are_said_before_anything_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converter, model = tmp_path / "convert_hf_to_gguf.py", folder(tmp_path / "hf", "glm4_moe")
    converter.write_text("raise SystemExit('read')")
    command = ["--model", str(model), "--converter", str(converter)]
    with pytest.raises(FileNotFoundError, match="no such folder to write to"):
        gguf.main([*command, "--output", str(tmp_path / "nowhere" / "m.gguf")])
    converter.write_text(CONVERTER)
    with pytest.raises(UserError, match=r"--outtype q9_9 is refused by the converter: argument --outtype: .*'?f32'?, '?bf16'?"):
        gguf.main([*command, "--output", str(tmp_path / "m.gguf"), "--outtype", "q9_9"])
    assert capsys.readouterr().err == "" and not (tmp_path / "m.gguf").exists()


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
