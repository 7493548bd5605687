"""YaRN takes a small byte model trained at 128 positions to 512; plain RoPE does not go there."""

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import MoEGPTConfig, MoEGPTForCausalLM

CONTEXT, FACTOR = 128, 4
HELD_OUT = ("argparse.py", "tempfile.py")


def standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of the running Python's own modules, 2 MB at most to train on; named ones to judge by, whole, since what is last
    in the folder is another file, and another difficulty, in every distribution."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    training, held_out = (
        b"\n\n".join(file.read_bytes() for file in files if (file.name in HELD_OUT) == held)[: 2 * 10**6] for held in (False, True)
    )
    return as_ids(training), as_ids(held_out)


def as_ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model: MoEGPTForCausalLM, text: Tensor, length: int, rows: int, steps: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        starts = torch.randint(0, len(text) - length - 1, (rows,), generator=generator)
        batch = torch.stack([text[start : start + length + 1] for start in starts])
        model(batch[:, :-1], shift_labels=batch[:, 1:]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: MoEGPTForCausalLM, text: Tensor, length: int) -> float:
    rows = (len(text) - 1) // (CONTEXT * FACTOR) * FACTOR * CONTEXT // length
    inputs, targets = (text[start : start + rows * length].view(rows, length) for start in (0, 1))
    return float(model.eval()(inputs, shift_labels=targets).loss.exp())


def with_config(model: MoEGPTForCausalLM, config: MoEGPTConfig) -> MoEGPTForCausalLM:
    other = MoEGPTForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    torch.manual_seed(0)
    training, held_out = standard_library()
    config = MoEGPTConfig.preset(
        "tiny",
        vocab_size=256,
        hidden_size=96,
        head_dim=32,
        num_hidden_layers=2,
        moe_intermediate_size=64,
        max_position_embeddings=CONTEXT,
        rope_parameters=None,
    )
    model = MoEGPTForCausalLM(config)
    train(model, training, CONTEXT, rows=16, steps=300, rate=5e-3, seed=0)
    longer = config.with_rope_factor(FACTOR)
    found = {
        "short": perplexity(model, held_out, CONTEXT),
        "plain": perplexity(model, held_out, CONTEXT * FACTOR),
        "yarn": perplexity(with_config(model, longer), held_out, CONTEXT * FACTOR),
    }
    continued = with_config(model, longer)
    train(continued, training, CONTEXT * FACTOR, rows=4, steps=20, rate=1e-3, seed=1)
    found["yarn, continued"] = perplexity(continued, held_out, CONTEXT * FACTOR)
    return found


def test_plain_rope_fails_beyond_its_context(figures: dict[str, float]) -> None:
    assert figures["short"] < 25  # of 256: the model has learned something
    assert figures["plain"] > 1.1 * figures["short"], figures  # 1.13 by Python 3.13's modules, 1.26 and 1.3 by two of 3.11


def test_yarn_at_generation_time(figures: dict[str, float]) -> None:
    """Without any training at the new length: a good part of plain RoPE's loss is gone (0.65, 0.5 and 0.35 of it are left)."""
    assert figures["yarn"] - figures["short"] < 0.8 * (figures["plain"] - figures["short"]), figures


def test_yarn_with_continued_training(figures: dict[str, float]) -> None:
    """Within 10 % of the perplexity at the short context after twenty steps (7 % of the training's tokens)."""
    assert figures["yarn, continued"] < 1.1 * figures["short"], figures
