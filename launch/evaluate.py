"""Measure an exported model on the validation split of preprocessed shards: loss, perplexity, bits per byte.

python launch/evaluate.py --model hf/ --data shards/ --output evaluation.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from launch.errors import make_quiet, run_command


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python launch/evaluate.py",
        description="Loss, perplexity and bits per byte of an exported model on a validation split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", type=Path, required=True, help="a folder of launch/export.py")
    p.add_argument("--data", type=Path, required=True, help="a folder of data/preprocess.py")
    p.add_argument("--output", type=Path, help="write the result there as JSON")
    p.add_argument("--sequence_length", type=int, help="tokens of one sample; default: the model's context")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--samples", type=int, default=0, help="the first so many samples; 0: the whole split")
    p.add_argument("--attn_implementation", choices=("flash", "sdpa", "eager"), default="flash")
    p.add_argument("--rope_factor", type=float, help="YaRN: this many times the context it was trained at")
    return p


def tokenizer_mismatch(model: Path, data: Any) -> str | None:
    """Why this model and these shards do not belong together, or None."""
    ours, theirs = ((folder / "tokenizer.json").read_bytes() for folder in (model, data.tokenizer_folder))
    if ours == theirs:
        return None
    return f"the shards of {data.tokenizer_folder.parent} were made with another tokenizer than the model's"


def measure(model: Any, data: Any, *, batch_size: int, samples: int) -> dict[str, Any]:
    """Mean loss in nats per token over the split's targets, in fp64 over the batches."""
    import torch
    from tqdm import tqdm

    total, targets = 0.0, 0
    with torch.no_grad():
        for first in tqdm(range(0, samples, batch_size), unit="batch", desc="evaluating", disable=None):
            batch = data.batch(range(first, min(first + batch_size, samples)))
            batch = {k: v.to(model.device) for k, v in batch.items()}
            total += float(model(**batch, num_items_in_batch=1).loss)
            targets += int((batch["shift_labels"] != -100).sum())
    loss = total / targets
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / data.text_bytes_per_token,
        "tokens": targets,
        "samples": samples,
        "sequence_length": data.sequence_length,
    }


def main() -> int:
    arguments = build_parser().parse_args()
    make_quiet()
    from data.dataset import PackedDataset
    from launch.exported import default_device, load_exported

    model, _ = load_exported(
        arguments.model,
        device=default_device(),
        attn_implementation=arguments.attn_implementation,
        rope_factor=arguments.rope_factor,
    )
    length = arguments.sequence_length or model.config.max_position_embeddings
    data = PackedDataset([arguments.data], split="validation", sequence_length=length)
    mismatch = tokenizer_mismatch(arguments.model, data)
    if mismatch:
        raise ValueError(mismatch)
    samples = min(arguments.samples or len(data), len(data))
    result = {"model": str(arguments.model), "data": str(arguments.data), "fingerprint": data.fingerprint}
    result.update(measure(model, data, batch_size=arguments.batch_size, samples=samples))
    if arguments.output:
        temporary = arguments.output.with_name(f".{arguments.output.name}.partial")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.output)
    print(
        f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte ({result['tokens']:,} tokens)"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
