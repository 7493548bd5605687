"""Keywords of a forward beside the named arguments: transformers and its friends pass many."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Read by the model, checked below, or without a meaning here (`cache_position`: positions follow the cache).
KNOWN = {
    *("output_hidden_states", "output_attentions", "is_causal", "cache_position"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
}

_PACKED = "holds_packed_documents"  # an attribute of a cache


def check_keywords(keywords: dict[str, Any], position_ids: Tensor | None) -> None:
    """Raises ValueError where ignoring a keyword would change the result; warns once of one that is not known."""
    asked = {name for name, value in keywords.items() if value is not None and value is not False}
    if "output_router_logits" in asked:
        raise ValueError("output_router_logits: the router's logits are not returned; router_aux_loss_coef needs none of them")
    if keywords.get("is_causal") is False:
        raise ValueError("is_causal=False: this model is a decoder, and its kernels compute causal attention only")
    if "cu_seq_lens_q" in asked and position_ids is None:
        raise ValueError("cu_seq_lens_q alone is not read: give position_ids that restart at each document")
    if "read_index" in asked:
        raise ValueError("generate_batch: this model has no paged attention for continuous batching; use generate, or vLLM")
    unknown = asked - KNOWN
    if unknown:
        logger.warning_once(f"the model's forward ignores {', '.join(sorted(unknown))}")


def given_cache(past_key_values: Cache | None, keywords: dict[str, Any]) -> Cache | None:
    """Takes `cache`, transformers' name for it from 5.24 on, out of the keywords. Raises ValueError where both are given."""
    cache: Cache | None = keywords.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values, which are two names of the same")
    return past_key_values if cache is None else cache


def note_documents(cache: Cache, past: int, *, packed: bool) -> None:
    """Notes on a cache that is begun whether packed documents fill it. Raises ValueError where such a one is gone on with: nobody
    says of which document the next token is, and it would look at all of them."""
    held = getattr(cache, _PACKED, False)
    if past and held:
        raise ValueError(
            "past_key_values holds packed documents (position_ids that restart), and which of them goes on is not said"
        )
    if not past and packed != held:
        setattr(cache, _PACKED, packed)


def check_export(dtype: torch.dtype) -> None:
    """Raises ValueError where `torch.export` would fail in torch's shape rule of the experts' grouped product (torch 2.13)."""
    if torch.compiler.is_exporting() and dtype != torch.bfloat16:
        raise ValueError(f"torch.export takes this model in bfloat16 only, got {dtype}: torch knows no other grouped product there")
