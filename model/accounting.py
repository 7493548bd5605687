"""How many parameters a configuration has and how many floating-point operations a token costs, by formula.

H hidden, I expert width, N query heads, M key-value heads, D head dim, E experts, K experts per token, V vocabulary.
A multiplication and an addition are two operations. Norms, softmax, RoPE and SwiGLU's elementwise part are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MoEGPTConfig
    from .sizes import ModelSizes

    Config = MoEGPTConfig | ModelSizes


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """total: all of them. active: those one token uses (its K experts, the shared one, both embeddings).
    routed_experts: the share of `total` that expert parallelism spreads over ranks."""

    total: int
    active: int
    routed_experts: int


def count_parameters(config: Config) -> ParameterCount:
    """By formula; a test holds it against `numel` for every preset."""
    c = config
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    routed, used = c.n_routed_experts * expert, c.num_experts_per_tok * expert
    shared = c.n_shared_experts * expert
    router = c.n_routed_experts * c.hidden_size
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    sinks = c.num_attention_heads if c.attention_sinks else 0
    dense_layer = attention_matrices(c) + shared + router + norms + sinks
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    outside = embeddings + c.hidden_size
    return ParameterCount(
        total=outside + c.num_hidden_layers * (dense_layer + routed),
        active=outside + c.num_hidden_layers * (dense_layer + used),
        routed_experts=c.num_hidden_layers * routed,
    )


def built_parameters(config: Config, ep_size: int) -> float:
    """Those that a rank holds while its engine is built: the whole model, as DeepSpeed 0.19.8 keeps every expert as it was built
    until all layers have a rank's own. On an engine of `tiny` with an EP size of 1: 1.49 times the model, as this counts."""
    count = count_parameters(config)
    return count.total + count.routed_experts / ep_size


def attention_matrices(config: Config) -> int:
    """Parameters of q, k, v and o in one layer."""
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return config.hidden_size * (2 * query + 2 * key)


def forward_flops_per_token(config: Config, sequence_length: int, causal: bool = True) -> float:
    """Of one forward: the matrices a token meets (LM head yes, input embedding no) and attention at this length.

    `causal` counts half of the S x S scores, which is what a flash kernel computes; PyTorch's FLOP counter counts all.
    """
    c = config
    experts = (c.num_experts_per_tok + c.n_shared_experts) * 3 * c.hidden_size * c.moe_intermediate_size
    layer = attention_matrices(c) + experts + c.n_routed_experts * c.hidden_size
    matrices = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
    # q k^T and probabilities times v: 2 operations x 2 products x S keys x N D
    scores = 4 * sequence_length * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return 2 * matrices + scores * (0.5 if causal else 1.0)


def training_flops_per_token(config: Config, sequence_length: int) -> float:
    """Forward, and twice that for the two gradients of each product; recomputation is not useful work, so not in it."""
    return 3 * forward_flops_per_token(config, sequence_length)
