"""llama.cpp's file of a glm4_moe export, by llama.cpp's own converter.

python -m launch.exporting.gguf --model hf/ --converter llama.cpp/convert_hf_to_gguf.py --output model.gguf

The converter stands in llama.cpp's repository (and in llama-cpp-python's source archive under vendor/llama.cpp). For Glm4Moe it
wants GLM's own chat tokens, and it stops at any BPE tokenizer that it has not seen before, a newly trained one as well. Both
questions are answered here: the vocabulary is written as a plain BPE one, pre-tokenized as StarCoder's is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

from data.cli import NotFound, UserError
from data.files import check_replaceable, read_json
from data.flags import Parser
from launch.cli import check_docstrings, run_command

PRE_TOKENIZER = "starcoder"  # digits one by one, then GPT-2's rule: how data/preprocess.py trains its tokenizers

EXAMPLES = """
python -m launch.exporting.gguf --model hf/ --converter llama.cpp/convert_hf_to_gguf.py --output model.gguf
"""


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m launch.exporting.gguf",
        description="Convert a glm4_moe export to llama.cpp's GGUF format.",
        examples=EXAMPLES,
    )
    p.add_argument("--model", type=Path, required=True, help="a folder that launch/export.py --format glm4_moe wrote")
    p.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    p.add_argument("--output", type=Path, required=True, help="the .gguf file to write")
    p.add_argument("--outtype", default="bf16", help="type of the weights, as the converter names it: f32, f16, bf16, q8_0, auto")
    p.add_argument("--pre_tokenizer", default=PRE_TOKENIZER, help="llama.cpp's name for the tokenizer's pre-tokenizer")
    return p


def check_model(folder: Path) -> None:
    """Raises UserError where llama.cpp has no architecture for the model."""
    if not (folder / "config.json").is_file():
        raise NotFound(f"--model {folder} has no config.json; name a folder that launch/export.py wrote")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "glm4_moe":
        raise UserError(
            f"--model {folder} is {model_type}, which llama.cpp does not know: it has no architecture with this model's sinks; "
            "export a model without sinks with --format glm4_moe"
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise UserError(f"{folder / name} names code of its own (auto_map), which the converter would offer to run; remove it")


def load_converter(path: Path) -> ModuleType:
    """The converter as a module; it finds its own package `gguf` beside itself."""
    specification = importlib.util.spec_from_file_location("convert_hf_to_gguf", path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise NotFound(f"--converter {path} is not there; it is convert_hf_to_gguf.py of llama.cpp's repository")
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(specification)
    sys.modules["convert_hf_to_gguf"] = module
    specification.loader.exec_module(module)
    return module


def answer_for_the_tokenizer(converter: ModuleType, pre_tokenizer: str) -> None:
    """Replace the converter's two questions that only GLM's own tokenizer can answer. Raises UserError where it has none."""
    base = getattr(converter, "TextModel", None)
    if base is None and importlib.util.find_spec("conversion") is not None:  # since 2026 the models stand in a package beside it
        base = importlib.import_module("conversion.base").TextModel
    if not all(hasattr(base, name) for name in ("_set_vocab_glm", "_set_vocab_gpt2", "get_vocab_base_pre")):
        raise UserError(f"{converter.__file__} is another version of the converter: its TextModel has other methods")

    def set_plain_vocabulary(model: Any) -> None:
        model._set_vocab_gpt2()

    def name_of_the_rule(model: Any, tokenizer: object) -> str:
        return pre_tokenizer

    base._set_vocab_glm, base.get_vocab_base_pre = set_plain_vocabulary, name_of_the_rule  # type: ignore[union-attr]


def check_outtype(converter: ModuleType, outtype: str) -> None:
    """Raises UserError with the converter's own words; left to itself it prints a page that names its flags, not ours."""
    said = io.StringIO()
    if not hasattr(converter, "parse_args"):  # another version's; it says itself what it does not take
        return
    try:
        with redirect_stderr(said):
            converter.parse_args()
    except SystemExit as refused:
        reason = " ".join(said.getvalue().rpartition("error: ")[2].split())
        raise UserError(f"--outtype {outtype} is refused by the converter: {reason}") from refused


def convert(converter: ModuleType, output: Path) -> None:
    """Under a hidden name, of which the converter is told, until it is whole."""
    plain = output.name.replace("{", "").replace("}", "")  # the converter fills in what stands in braces
    temporary = output.with_name(f".{plain}.tmp")
    sys.argv += ["--outfile", str(temporary)]
    try:
        converter.main()
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_docstrings()  # the converter loads transformers
    check_model(arguments.model)
    check_replaceable(arguments.output)
    converter = load_converter(arguments.converter)
    answer_for_the_tokenizer(converter, arguments.pre_tokenizer)
    sys.argv = [str(arguments.converter), str(arguments.model), "--outtype", arguments.outtype]
    check_outtype(converter, arguments.outtype)
    convert(converter, arguments.output)
    return 0


if __name__ == "__main__":
    run_command(main)
