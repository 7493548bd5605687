"""The loss of several splits: plain sums over the samples that were asked for, whatever the batches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.evaluation.loss import measure


class Data:
    """As much of a dataset as is read here. The targets of sample i are `first` + i, + i + 1 and + i + 2; every third has two."""

    sequence_length, document_mask, fingerprint = 3, True, "f"

    def __init__(self, samples: int, first: int) -> None:
        self.samples, self.first = samples, first

    def __len__(self) -> int:
        return self.samples

    def targets(self, sample: int) -> list[int]:
        found = [self.first + sample + place for place in range(3)]
        return found if sample % 3 else [-100, *found[1:]]

    def batch(self, samples: range) -> dict[str, torch.Tensor]:
        assert max(samples) < self.samples
        return {"shift_labels": torch.tensor([self.targets(sample) for sample in samples])}

    def text_bytes_per_token(self, samples: int | None = None) -> float:
        """Of its first samples alone, as where they are of another folder than the rest."""
        return self.first + (samples or 100) / 4


def model(*, shift_labels: torch.Tensor, num_items_in_batch: int) -> Any:
    """A hundredth of each target, in nats, as a sum."""
    return SimpleNamespace(loss=shift_labels[shift_labels != -100].sum() / 100 / num_items_in_batch)


model.device = torch.device("cpu")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("batches", "read"), [(0, {"a": 7, "b": 4}), (1, {"a": 3, "b": 3}), (2, {"a": 6, "b": 4})])
def test_splits_are_summed_sample_by_sample(batches: int, read: dict[str, int]) -> None:
    """Seven samples and four, which fill no whole number of batches of three."""
    splits: dict[str, Any] = {"a": Data(7, 10), "b": Data(4, 500)}
    found = measure(model, splits.items(), batch_size=3, batches=batches)
    targets = {n: [t for i in range(read[n]) for t in data.targets(i) if t != -100] for n, data in splits.items()}
    nats = {name: sum(kept) / 100 for name, kept in targets.items()}
    text = {name: len(targets[name]) * (data.first + read[name] / 4) for name, data in splits.items()}
    for name, one in found["splits"].items():
        assert (one["samples"], one["tokens"]) == (read[name], len(targets[name]))
        assert one["loss"] == pytest.approx(nats[name] / len(targets[name]))
        assert one["bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / text[name])
    whole = sum(nats.values()) / sum(map(len, targets.values()))
    assert found["tokens"] == sum(map(len, targets.values())) and found["loss"] == pytest.approx(whole)
    assert found["bits_per_byte"] == pytest.approx(sum(nats.values()) / math.log(2) / sum(text.values()))
    assert found["perplexity"] == pytest.approx(math.exp(whole))
