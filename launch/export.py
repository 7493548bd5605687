"""Turn a checkpoint, whatever its EP size and ZeRO stage, into one folder that transformers, vLLM and lm-eval load.

python launch/export.py --checkpoint runs/first --output hf/

The weights are the optimizer's fp32 masters, rounded once where a narrower dtype is asked for. Everything is written to a hidden
folder beside the output, read back and compared, and only then gets its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.flags import Parser
from data.terminal import say, stdout
from launch.cli import make_quiet, run_command
from launch.exporting import folder, formats, hub_upload, source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("bfloat16", "float32")
EXAMPLES = """
python launch/export.py --checkpoint runs/first --output hf/
python launch/export.py --checkpoint runs/first --tag best --output hf/ --dtype float32
"""


def build_parser() -> argparse.ArgumentParser:
    about = "Export a checkpoint as a transformers folder: safetensors, configuration, tokenizer, model card."
    p = Parser(prog="python launch/export.py", description=about, examples=EXAMPLES)
    p.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder, or one of its checkpoints/step_N")
    p.add_argument("--tag", metavar="TAG", help="which of the run's checkpoints: step_N, latest or best (default: latest)")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, or one that an earlier export wrote")
    p.add_argument(
        "--format",
        choices=formats.FORMATS,
        default="moe_gpt",
        help="moe_gpt: Glm4Moe with sinks, with two small code files next to the weights; glm4_moe: transformers' own class, "
        "for models without sinks (launch/exporting/gguf.py converts it for llama.cpp)",
    )
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights")
    p.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest size of a safetensors file")
    p.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload to this private repository of the Hugging Face hub")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.push_to_hub:
        hub_upload.check_name(arguments.push_to_hub)
    make_quiet()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    checkpoint = source.find_checkpoint(arguments.checkpoint, arguments.tag)
    folder.check_output(arguments.output)
    folder.check_shard_size(arguments.max_shard_size)
    with source.reading(checkpoint):
        trained = source.model_config(checkpoint)
    config = formats.exported_config(trained, arguments.format)
    if arguments.format == "moe_gpt" and formats.fits_glm4_moe(trained):
        say("this model has no sinks: --format glm4_moe needs no code beside the weights, and its attention takes sdpa", stdout)
    with folder.holding(arguments.output):
        with source.reading(checkpoint):
            write_export(checkpoint, config, arguments)
        if arguments.push_to_hub:
            say(f"uploaded to {hub_upload.upload(arguments.output, arguments.push_to_hub)}", stdout)
    return 0


def write_export(checkpoint: Path, config: PreTrainedConfig, arguments: argparse.Namespace) -> None:
    say(f"verifying {checkpoint} ...", stdout)
    source.verify(checkpoint)
    say("reading the weights ...", stdout)
    model = formats.build(config, source.weights(checkpoint), arguments.dtype)
    say(f"writing {arguments.output} ...", stdout)
    folder.write(model, checkpoint, arguments.output, max_shard_size=arguments.max_shard_size)
    count = sum(p.numel() for p in model.parameters())
    say(f"exported {checkpoint.name} as {arguments.format} in {arguments.dtype}: {count:,} parameters", stdout)


if __name__ == "__main__":
    run_command(main)
