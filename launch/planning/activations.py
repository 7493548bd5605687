"""What one micro-batch keeps for its backward, tensor by tensor.

Each row is a tensor that autograd holds from the forward on, in elements a token and layer. The rows follow `model/` and
`launch/engine/moe_layer.py`; a test counts what a real engine holds and fails where the two part.

H hidden, Q query width (heads x head dim), KV key width, I expert width, S shared expert's width, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.job import Job

FP32 = 4
INDEX = 8  # bytes of an int64
#: Bytes of a chunk's fp32 logits, and its most tokens a hidden unit: `model/loss.py`.
CHUNK_BYTES, CHUNK_ROWS_PER_HIDDEN = 256 * 2**20, 2


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

    @property
    def most(self) -> float:
        """In the head's forward, or in the backward of the first block that comes to it."""
        return self.held + max(self.loss, self.recomputed + self.working)


def kept_activations(job: Job, *, fused_norms: bool = True, load: float = 1.0) -> Kept:
    """For `load` times the even share of routed rows on this rank. Without `fused_norms` (a CPU) a norm keeps fp32 copies."""
    c, layers = job.sizes, job.sizes.num_hidden_layers
    block = {"none": 0.0, "selective": selective_block(job), "full": boundary(job)}
    rows = {"none": 0.0, "selective": selective_rows(job), "full": 0.0}
    whole, whole_rows = plain_block(job, fused_norms), plain_rows(job) * load
    if job.recompute == "none":
        kept, kept_rows, again = whole, whole_rows, 0.0
    else:
        kept, kept_rows = block[job.recompute], rows[job.recompute] * load
        again = whole + whole_rows - kept - kept_rows
    return Kept(
        layers=job.tokens * (layers * kept + norm(job, c.hidden_size, fused_norms)),  # and the last norm
        experts=job.tokens * layers * kept_rows,
        recomputed=job.tokens * again,
        loss=loss_bytes(job),
        loss_kept=(c.vocab_size + job.tokens) * c.hidden_size * job.weight_bytes,
        working=job.tokens * working_block(job, load),
    )


def norm(job: Job, width: float, fused: bool) -> float:
    """Beyond its output: its input, and where it is not one kernel the fp32 input and normalised input."""
    return width * job.weight_bytes if fused else 2 * width * FP32


def plain_block(job: Job, fused_norms: bool) -> float:
    """Bytes a token of a block that keeps everything, routed rows aside."""
    c, w = job.sizes, job.weight_bytes
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shared = c.n_shared_experts * c.moe_intermediate_size
    norms = 2 * norm(job, c.hidden_size, fused_norms) + 2 * c.hidden_size * w  # both inputs, both outputs
    if c.qk_norm:
        norms += norm(job, query + key, fused_norms)
    attention = (query + key) * w + key * w + query * w + c.num_attention_heads * FP32  # q, k rotated, v, out, lse
    router = (c.hidden_size * FP32 if w < FP32 else 0) + c.n_routed_experts * (FP32 + INDEX)
    return norms + attention + router + 3 * shared * w  # gate, up, their product


def plain_rows(job: Job) -> float:
    """Bytes a token of its routed rows: row, gate and up, their product, result; order, place and weight."""
    c, w = job.sizes, job.weight_bytes
    return c.num_experts_per_tok * (2 * c.hidden_size * w + 3 * c.moe_intermediate_size * w + 2 * INDEX + FP32)


def boundary(job: Job) -> float:
    """A block's input and its experts' choice, a view into the sorted order of all experts."""
    return job.sizes.hidden_size * job.weight_bytes + job.sizes.n_routed_experts * INDEX


def selective_block(job: Job) -> float:
    """`boundary`, and what matrix products and attention put out."""
    c, w = job.sizes, job.weight_bytes
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shared = c.n_shared_experts * c.moe_intermediate_size
    products = query + 2 * key + c.hidden_size + 2 * shared + c.hidden_size
    attention = query * w + c.num_attention_heads * FP32
    return boundary(job) + products * w + attention + c.n_routed_experts * FP32


def selective_rows(job: Job) -> float:
    """Gate and up, and the result."""
    c = job.sizes
    return c.num_experts_per_tok * (2 * c.moe_intermediate_size + c.hidden_size) * job.weight_bytes


def loss_bytes(job: Job) -> float:
    """The fused loss at its fullest: the head's gradient in fp32, the input's, and a chunk of logits while the one before it
    is not yet gone; or the head's gradient once more, rounded."""
    c, w = job.sizes, job.weight_bytes
    head, rows = c.vocab_size * c.hidden_size, chunk_rows(job)
    following = min(rows, job.tokens - rows)
    # fp32 logits come from rounded ones, and a rounded gradient stays
    fresh, stays = (FP32 + w, w) if w < FP32 else (FP32, FP32)
    chunks = c.vocab_size * max(fresh * rows, stays * rows + fresh * following)
    return head * FP32 + job.tokens * c.hidden_size * w + max(chunks, head * w if w < FP32 else 0)


def chunk_rows(job: Job) -> int:
    """Tokens of one pass through the head."""
    limit = min(CHUNK_ROWS_PER_HIDDEN * job.sizes.hidden_size, CHUNK_BYTES // (FP32 * job.sizes.vocab_size))
    return max(1, min(limit, job.tokens))


def working_block(job: Job, load: float) -> float:
    """The widest moment of a block's backward: gradients of the routed rows beside those of the residual stream. Part of them
    is fp32 whatever the type, and not all are there at once: 0.25 of both sizes fits what was counted."""
    c = job.sizes
    rows = c.num_experts_per_tok * load * (2 * c.hidden_size + 3 * c.moe_intermediate_size)
    return (rows + 3 * c.hidden_size) * 0.25 * (job.weight_bytes + FP32)
