"""Continue a prompt with an exported model.

python launch/generate.py --model hf/ --prompt 'def fibonacci(n):'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.errors import make_quiet, run_command


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python launch/generate.py",
        description="Continue a prompt with an exported model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", type=Path, required=True, help="a folder of launch/export.py")
    p.add_argument("--prompt", required=True, help="text to continue; - reads it from standard input")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.2, help="0: always the likeliest token")
    p.add_argument("--top_p", type=float, default=0.95)
    p.add_argument("--top_k", type=int, default=0, help="0: no limit")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--attn_implementation", choices=("flash", "sdpa", "eager"), default="sdpa")
    p.add_argument("--rope_factor", type=float, help="YaRN: this many times the context it was trained at")
    return p


def check(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {arguments.max_new_tokens}")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, not {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {arguments.top_p}")
    if arguments.top_k < 0:
        raise ValueError(f"--top_k must be 0 or more, not {arguments.top_k}")


def main() -> int:
    arguments = build_parser().parse_args()
    check(arguments)
    make_quiet()
    import torch
    from transformers import TextStreamer

    from launch.exported import default_device, load_exported

    model, tokenizer = load_exported(
        arguments.model,
        device=default_device(),
        attn_implementation=arguments.attn_implementation,
        rope_factor=arguments.rope_factor,
    )
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise ValueError("--prompt is empty; give the text to continue")
    longest = model.config.max_position_embeddings
    if ids.shape[1] + arguments.max_new_tokens > longest:
        raise ValueError(
            f"{ids.shape[1]} prompt tokens and --max_new_tokens {arguments.max_new_tokens} are beyond the model's {longest} "
            "positions; ask for fewer tokens, or extend the context with --rope_factor"
        )
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "top_k": arguments.top_k,
        }
    eos = model.config.eos_token_id
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
