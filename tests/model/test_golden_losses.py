"""Losses of the first 50 steps of `tiny`, kept at full precision: a refactoring must leave them as they are.

Plain PyTorch on one thread, flash attention, AdamW, the balancer on, 2 x 64 tokens of generated text, in float64:
another processor sums in another order, and in fp32 one token that changes its expert for that has moved the losses by
5e-2 after 50 steps (AVX2 against AVX-512), where in float64 they agree to 1e-8. The first steps are held in fp32 too.

After a change that is meant to move them: `python tests/model/test_golden_losses.py` prints the new list.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.balance import LoadBalancer

# fmt: off
GOLDEN = [
    8.333125639, 8.055710772, 7.607236183, 7.046867829, 7.005677982, 6.333784325, 6.183805640, 6.553874494,
    6.269749610, 5.373842461, 5.580262994, 4.683311845, 4.889366769, 5.153549208, 4.284470215, 4.469053219,
    4.083309902, 3.919190432, 4.041616815, 3.133122957, 3.263339936, 2.685551763, 3.203688131, 3.167456169,
    3.373484153, 3.494227746, 2.372880619, 2.926015309, 2.208630619, 2.581993917, 1.715449586, 2.136213825,
    1.747727141, 2.236345510, 1.845105467, 2.505787824, 1.892202710, 2.198713270, 1.292687221, 2.635365647,
    1.936664299, 1.535660669, 1.524854381, 1.962501511, 1.911194780, 2.192316247, 1.430943899, 1.868354743,
    2.013313310, 1.360184943,
]
# fmt: on


def text(length: int, seed: int) -> list[int]:
    """Token ids with something to learn: words of a small vocabulary, each a fixed run of tokens, and repetitions."""
    generator = random.Random(seed)  # Python's own generator is the same on every platform and version
    words = [[generator.randrange(4096) for _ in range(generator.randrange(1, 6))] for _ in range(150)]
    ids: list[int] = []
    while len(ids) < length:
        phrase = [words[min(int(generator.expovariate(0.05)), 149)] for _ in range(generator.randrange(2, 8))]
        for word in phrase * generator.randrange(1, 3):
            ids += word
    return ids[:length]


def train(steps: int = 50, dtype: torch.dtype = torch.float64) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # fp32 random numbers differ in the last bit between vector units
    try:
        model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", attn_implementation="flash")).to(dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    balancer = LoadBalancer(model, rate=0.001)
    ids = torch.tensor(text(steps * 2 * 64 + 1, seed=0))
    losses = []
    for step in range(steps):
        start = step * 128
        inputs, targets = ids[start : start + 128].view(2, 64), ids[start + 1 : start + 129].view(2, 64)
        loss = model(inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    return losses


def test_losses_are_the_golden_ones() -> None:
    losses = train()
    assert losses == pytest.approx(GOLDEN, abs=1e-6)
    assert losses[0] - losses[-1] > 2  # it learns


def test_fp32_begins_the_same() -> None:
    assert train(6, torch.float32) == pytest.approx(GOLDEN[:6], abs=1e-4)


if __name__ == "__main__":
    print("GOLDEN = [")
    for loss in train():
        print(f"    {loss:.9f},")
    print("]")
