"""What one micro-batch keeps for its backward, tensor by tensor.

Each row is a tensor that autograd holds from the forward on, in elements a token and layer. The rows follow `model/` and
`launch/engine/moe_layer.py`; a test counts what a real engine holds and fails where the two part.

H hidden, Q query width (heads x head dim), KV key width, I expert width, S shared expert's width, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.job import Job
from model import heuristics

FP32 = 4
INDEX = 8  # bytes of an int64


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one rank's micro-batch. `experts` grow with the rows that the router sends here, the rest does not."""

    layers: float
    experts: float
    recomputed: float  # of the one block that is in its backward, where blocks are recomputed
    loss: float  # at its fullest, within the forward
    loss_kept: float  # of it, until the backward
    working: float  # gradients and temporaries of one block's backward

    @property
    def held(self) -> float:
        """From the blocks' forward to their backward."""
        return self.layers + self.experts


def kept_activations(job: Job, *, kernels: bool = True, load: float = 1.0) -> Kept:
    """For `load` times the even share of routed rows on this rank. `kernels` are those of `model/kernels/`, a GPU's way; without
    them (a CPU) norms, router and loss keep fp32 copies."""
    c, layers, mode = job.sizes, job.sizes.num_hidden_layers, job.activation_checkpointing
    kept = {"none": plain_block(job, kernels), "selective": selective_block(job, kernels), "full": boundary(job, kernels)}
    rows = {"none": plain_rows(job), "selective": selective_rows(job), "full": 0.0}
    block, row = kept[mode], rows[mode] * load
    again = {
        "none": 0.0,
        "selective": selective_again(job) * load,
        "full": kept["none"] + rows["none"] * load - block - row,
    }[mode]
    return Kept(
        layers=job.tokens * (layers * block + norm(job, c.hidden_size, kernels)),  # and the last norm
        experts=job.tokens * layers * row,
        recomputed=job.tokens * again,
        loss=loss_bytes(job, kernels),
        loss_kept=(c.vocab_size + job.tokens) * c.hidden_size * job.weight_bytes,
        working=job.tokens * working_block(job, kernels, load),
    )


def norm(job: Job, width: float, kernels: bool) -> float:
    """Beyond its output: its input, and where it is not one kernel the fp32 input and normalised input."""
    return width * job.weight_bytes if kernels else 2 * width * FP32


def plain_block(job: Job, kernels: bool) -> float:
    """Bytes a token of a block that keeps everything, routed rows aside."""
    c, w = job.sizes, job.weight_bytes
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shared = c.n_shared_experts * c.moe_intermediate_size
    norms = 2 * norm(job, c.hidden_size, kernels) + 2 * c.hidden_size * w  # both inputs, both outputs
    if c.qk_norm or kernels:  # one kernel norms and turns, and keeps what it was given
        norms += norm(job, query + key, kernels)
    attention = (query + key) * w + key * w + query * w + c.num_attention_heads * FP32  # q, k rotated, v, out, lse
    copy = 0 if kernels or w == FP32 else c.hidden_size * FP32
    return norms + attention + copy + c.n_routed_experts * FP32 + choice(job, kernels) + 3 * shared * w  # gate, up, their product


def choice(job: Job, kernels: bool) -> float:
    """The experts of a token; without kernels a view into the sorted order of all experts."""
    return INDEX * (job.sizes.num_experts_per_tok if kernels else job.sizes.n_routed_experts)


def plain_rows(job: Job) -> float:
    """Bytes a token of its routed rows: row, gate and up, their product; order, place and weight."""
    c, w = job.sizes, job.weight_bytes
    return c.num_experts_per_tok * (c.hidden_size * w + 3 * c.moe_intermediate_size * w + 2 * INDEX + FP32)


def boundary(job: Job, kernels: bool) -> float:
    """A block's input and its experts' choice."""
    return job.sizes.hidden_size * job.weight_bytes + choice(job, kernels)


def selective_block(job: Job, kernels: bool) -> float:
    """`plain_block` without what norms, RoPE and SwiGLU put out, and without fp32 copies: those are made again."""
    c, w = job.sizes, job.weight_bytes
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    turned = query + key  # before their norm; where there is none the kernel keeps them besides
    turned *= 1 if c.qk_norm or not kernels else 2
    attention = (turned + key + query) * w + c.num_attention_heads * FP32
    shared = c.n_shared_experts * c.moe_intermediate_size
    return 2 * c.hidden_size * w + attention + c.n_routed_experts * FP32 + choice(job, kernels) + 2 * shared * w


def selective_rows(job: Job) -> float:
    """`plain_rows` without the product of gate and up, and without the rows where they come from no other rank."""
    c, w = job.sizes, job.weight_bytes
    again = c.moe_intermediate_size + (c.hidden_size if job.ep_size == 1 else 0)
    return plain_rows(job) - c.num_experts_per_tok * again * w


def selective_again(job: Job) -> float:
    """Of what is made again, what is there at a block's fullest moment: the rows beside their gradient, or SwiGLU's product."""
    c = job.sizes
    return c.num_experts_per_tok * (c.hidden_size if job.ep_size == 1 else c.moe_intermediate_size) * job.weight_bytes


def loss_bytes(job: Job, kernels: bool) -> float:
    """The fused loss at its fullest: the head's gradient in fp32, the input and its gradient, and a chunk of logits with what is
    made of it, or the head's gradient once more, rounded."""
    c, w = job.sizes, job.weight_bytes
    head = c.vocab_size * c.hidden_size
    chunk = c.vocab_size * chunk_rows(job, kernels)
    rounded = head * w if w < FP32 else 0  # a chunk's share of the head's gradient, and at the end all of it
    # A kernel leaves the gradient where the logits were. Without, fp32 logits come from rounded ones and round to their gradient.
    logits = chunk * w if kernels or w == FP32 else chunk * (FP32 + w)
    return head * FP32 + 2 * job.tokens * c.hidden_size * w + max(logits, chunk * w + rounded)


def chunk_rows(job: Job, kernels: bool = True) -> int:
    """Tokens of one pass through the head."""
    logit = job.weight_bytes if kernels else FP32
    return min(heuristics.chunk_rows(job.sizes.vocab_size, job.sizes.hidden_size, logit), job.tokens)


def working_block(job: Job, kernels: bool, load: float) -> float:
    """The widest moment of a block's backward: gradients of the routed rows beside those of the residual stream. Without kernels
    part of them is fp32 whatever the type, and not all are there at once: 0.25 of both sizes fits what was counted."""
    c, w, mode = job.sizes, job.weight_bytes, job.activation_checkpointing
    if kernels:
        beside = c.hidden_size
        if mode == "full":  # at the end of its second forward: results, the shared expert's, their sum, and its gradient
            beside *= 3
        elif mode == "selective" and job.ep_size == 1:  # the shared expert's two wait, its gate and up are gone
            beside += max(0, 2 * (c.hidden_size - c.n_shared_experts * c.moe_intermediate_size))
        return (c.num_experts_per_tok * load * c.hidden_size + beside) * w
    rows = c.num_experts_per_tok * load * (2 * c.hidden_size + 3 * c.moe_intermediate_size)
    return (rows + 3 * c.hidden_size) * 0.25 * (w + FP32)
