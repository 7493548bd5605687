"""The shards that many runs read: each split is opened once, however many do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data.dataset import PackedDataset
from launch.run.arguments import TrainArguments, parse_source


class Splits(NamedTuple):
    train: PackedDataset
    validation: PackedDataset


class Shards:
    """Opened by what `--data` says, and the tokens of a sample."""

    def __init__(self) -> None:
        self._opened: dict[tuple[tuple[str, ...], int], Splits] = {}

    def of(self, data: Sequence[str], sequence_length: int) -> Splits:
        """Raises UserError where there is nothing to train or nothing to validate on."""
        key = (tuple(data), sequence_length)
        if key not in self._opened:
            sources = [parse_source(text) for text in data]
            train = PackedDataset(sources, split="train", sequence_length=sequence_length)
            validation = PackedDataset(sources, split="validation", sequence_length=sequence_length)
            self._opened[key] = Splits(train, validation)
        return self._opened[key]

    def read_by(self, arguments: TrainArguments) -> Splits:
        """Those of a training."""
        return self.of(arguments.data, arguments.sequence_length)


def epochs(data: PackedDataset, tokens: float) -> float:
    """How often so many tokens read the data; of a weighted blend, the source that is read most often."""
    if data.weights is None:
        return tokens / data.tokens
    shares = [weight / sum(data.weights) for weight in data.weights]
    return float(max(tokens * share / (count * data.sequence_length) for share, count in zip(shares, data.samples, strict=True)))
