"""Loss, perplexity and bits per byte of a model on validation splits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from data.cli import UserError
from data.dataset import IGNORED, PackedDataset
from data.terminal import Progress
from data.tokens import tokenizer as tokenizers


def check_tokenizer(tokenizer_json: bytes, data: PackedDataset) -> None:
    """Raises UserError if the shards were not made with the model's tokenizer."""
    if tokenizers.fingerprint(tokenizer_json.decode()) != data.tokenizer_fingerprint:
        raise UserError(f"the shards of {data.tokenizer_folder.parent} were made with another tokenizer than the model's")


def summed_loss(model: Any, data: PackedDataset, *, batch_size: int, samples: int, what: str) -> tuple[float, int]:
    """(nats, targets) of the first samples, summed in fp64 over the batches."""
    total, targets = 0.0, 0
    progress = Progress(samples, what=what, unit="samples")
    with torch.no_grad():
        for first in range(0, samples, batch_size):
            batch = data.batch(range(first, min(first + batch_size, samples)))
            targets += int((batch["shift_labels"] != IGNORED).sum())
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += float(model(**batch, num_items_in_batch=1).loss)
            progress.update(min(first + batch_size, samples))
    progress.close()
    return total, targets


def statistics(nats: float, targets: int, text_bytes: float) -> dict[str, float]:
    """text_bytes: of the text that the targets stand for."""
    loss = nats / targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp(710) is more than a float holds
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "tokens": targets,
    }


def measure(model: Any, splits: Iterable[tuple[str, PackedDataset]], *, batch_size: int, batches: int) -> dict[str, Any]:
    """Over all splits together at the top, and of each by name in `splits`. batches: at most so many of each split; 0: all."""
    nats, targets, text_bytes, described = 0.0, 0, 0.0, {}
    for name, data in splits:
        samples = min(len(data), batches * batch_size or len(data))
        some_nats, some_targets = summed_loss(model, data, batch_size=batch_size, samples=samples, what=f"evaluating {name}")
        some_bytes = some_targets * data.text_bytes_per_token(samples)
        nats, targets, text_bytes = nats + some_nats, targets + some_targets, text_bytes + some_bytes
        described[name] = {
            **statistics(some_nats, some_targets, some_bytes),
            "samples": samples,
            "fingerprint": data.fingerprint,
            "sequence_length": data.sequence_length,
            "document_mask": data.document_mask,
        }
    return {**statistics(nats, targets, text_bytes), "splits": described}
