"""The validation loss is plain cross entropy over just its samples, whatever the number of ranks and the size of their batches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import PackedDataset
from launch.run import validation
from launch.run.validation import Validation
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.sinks import watching_sink_mass

OLD = Path(__file__).resolve().parents[2] / "fixtures" / "shards_before_rooms" / "finished"
MICRO_BATCH = 2


class Engine:
    """As much of DeepSpeed's as an evaluation calls."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        torch.manual_seed(0)
        fields = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
        config = MoEGPTConfig.preset("tiny", **fields, initializer_range=0.2, expert_dropout=0.5, z_loss_weight=0.1)
        config._attn_implementation = "flash"
        self.module = MoEGPTForCausalLM(config).train()
        self.eval, self.train = self.module.eval, self.module.train
        self.forwards = 0

    def train_micro_batch_size_per_gpu(self) -> int:
        return MICRO_BATCH

    def __call__(self, **batch: Any) -> Any:
        assert not self.module.training and not torch.is_grad_enabled()
        assert batch["input_ids"].shape[0] == MICRO_BATCH
        self.forwards += 1
        return self.module(**batch)


def on_ranks(monkeypatch: pytest.MonkeyPatch, number: int, engine: Engine, data: PackedDataset, samples: int) -> list[Validation]:
    """Each rank's evaluation, one after the other: first for what it brings to each all-reduce, then with the sums of all."""
    brought: list[list[Tensor]] = []
    forwards, done = [], []
    for summed in (False, True):
        for rank in range(number):
            calls = iter(range(9))
            mine: list[Tensor] = []

            def all_reduce(tensor: Tensor, summed: bool = summed, calls: Any = calls, mine: list[Tensor] = mine) -> None:
                mine.append(tensor.clone())
                if summed:
                    call = next(calls)
                    tensor.copy_(torch.stack([ranks[call] for ranks in brought]).sum(dim=0))

            fake = SimpleNamespace(get_rank=lambda rank=rank: rank, get_world_size=lambda: number, all_reduce=all_reduce)
            monkeypatch.setattr(validation, "dist", fake)
            one = Validation(engine=engine, data=data, samples=samples, on_phase=lambda _: None)  # type: ignore[arg-type]
            engine.forwards = 0
            one.loss = one.mean_loss()  # type: ignore[attr-defined]
            forwards.append(engine.forwards)
            if summed:
                done.append(one)
            else:
                brought.append(mine)
    assert len(set(forwards)) == len({len(mine) for mine in brought}) == 1, "forwards are collective, as the sums are"
    return done


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_plain_cross_entropy_over_its_samples(ranks: int, document_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven samples fill no whole number of batches: what pads the last ones counts for nothing."""
    data = PackedDataset([OLD], split="validation", sequence_length=16, document_mask=document_mask)
    samples = 7
    assert len(data) > samples + ranks * MICRO_BATCH
    engine = Engine(data.vocab_size)
    found = on_ranks(monkeypatch, ranks, engine, data, samples)
    assert engine.module.training, "training goes on in its mode"
    batch = data.batch(range(samples))
    targets = batch.pop("shift_labels")
    with torch.no_grad():
        logits = engine.module.eval()(**batch).logits.double()
    counts = (targets != -100).sum(dim=1)
    assert (len(set(counts.tolist())) > 1) == document_mask, "else a mean of means would be the mean"
    expected = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert [one.loss for one in found] == pytest.approx([expected] * ranks, rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_sinks_share_is_each_layers_own(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PackedDataset([OLD], split="validation", sequence_length=16)
    engine = Engine(data.vocab_size)
    with torch.no_grad():
        for layer, logit in zip(engine.module.model.layers, (-30.0, 30.0), strict=True):
            layer.self_attn.sinks.fill_(logit)
    for one in on_ranks(monkeypatch, ranks, engine, data, 8):
        assert one.sink_mass == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_sinks_share_is_the_samples_mean(ranks: int, document_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample alone, then their mean: what pads the last batches counts for nothing, else a resume on more ranks would make
    the curve jump."""
    data = PackedDataset([OLD], split="validation", sequence_length=16, document_mask=document_mask)
    engine, masses, samples = Engine(data.vocab_size), list[Tensor](), 7
    with torch.no_grad(), watching_sink_mass(masses.append):
        for sample in range(samples):
            engine.module.eval()(**data.batch([sample]))
    mass_YM = torch.stack([mass_T.double().mean() for mass_T in masses]).view(samples, 2).T
    assert (mass_YM[:, -1] - mass_YM.mean(dim=1)).abs().min() > 1e-4, "counted twice, the last one would be seen"
    for one in on_ranks(monkeypatch, ranks, engine, data, samples):
        assert one.sink_mass == pytest.approx(mass_YM.mean(dim=1).tolist(), rel=1e-6)


def test_bits_per_byte_are_of_the_samples_that_were_judged() -> None:
    """Of several folders with their own bytes a token the first samples may be of one alone."""
    data: Any = SimpleNamespace(text_bytes_per_token=lambda samples=None: {1: 2.0, None: 4.0}[samples])
    one = Validation(engine=None, data=data, samples=1, on_phase=print)  # type: ignore[arg-type]
    assert one.bits_per_byte(3 * math.log(2)) == pytest.approx(1.5)


def test_losses_are_comparable_on_the_same_samples_of_the_same_shards() -> None:
    first, second = (
        PackedDataset([OLD], split="train", sequence_length=length) for length in (16, 32)
    )  # another length, other samples
    judged = [
        Validation(engine=None, data=data, samples=samples, on_phase=print).judged_on()  # type: ignore[arg-type]
        for data, samples in ((first, 4), (first, 4), (first, 5), (second, 4))
    ]
    assert judged[0] == judged[1] and all(judged[0] != other for other in judged[2:])
