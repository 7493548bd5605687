"""How long an optimizer step takes, by what it waits for, and what that makes of a budget of tokens.

A model of the step, not a measurement: shares of the device's peaks that are assumed (`devices.json`), bytes and kernels counted
from the code by `launch/benchmark.py roofline`. No GPU has been measured yet; `step` does it, and `make gpu` shows both.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.activations import FP32, chunk_rows
from launch.planning.communication import Traffic, traffic
from launch.planning.devices import Device
from launch.planning.job import Job
from model.accounting import attention_matrices, training_flops_per_token
from model.heuristics import fits_kernel, joining_pays

#: The fullest rank's or expert's share of rows over the mean, the router's bias at work. Assumption; metrics.jsonl has it.
USUAL_LOAD = 1.1
#: Of the time that a collective could hide behind the backward, what it does: it takes memory bandwidth and processors.
HIDING = 0.9
#: Kernels of a layer, forward and backward, by the roofline's count; more where rows are exchanged; more where those that arrive
#: are of several experts; fewer where those multiply by our kernel, which takes gate and up as they lie. Nine of twenty are the
#: forward's, which a recomputed block launches once more; `selective` makes six again, of which one is the gather of rows that are
#: not exchanged.
KERNELS, EXCHANGE_KERNELS, GROUPING_KERNELS, SPARED_KERNELS, SELECTIVE_KERNELS = 75, 8, 20, 4, 6
#: Bytes that a GPU's host moves to and from it a second, and its memory's speed for one rank's share of CPU Adam.
PCIE_SPEED, HOST_MEMORY_SPEED = 20e9, 20e9
#: Bytes a parameter that ZeRO-2 in bf16 with fp32 sums moves beside its collectives, counted on an engine of DeepSpeed 0.19.8. In
#: every micro-step of what a rank holds (into the bucket, flat, scaled) and of its shard (added to the sum, and back); in every
#: optimizer step of its shard (AdamW 28, norm 20 by way of fp64, clipping 8, cast 6, whether finite 8, zeroing 4).
HELD_BYTES, SHARD_BYTES, STEP_BYTES = 12, 14, 74

#: The parts of a `StepTime` that add up to the step, and what each is called.
WAITS = {
    "matrix": "matrix products",
    "attention": "attention",
    "memory": "memory traffic",
    "recompute": "recomputation",
    "optimizer": "gradients and optimizer",
    "imbalance": "uneven experts",
    "communication": "communication",
    "host": "the host",
}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    matrix: float
    attention: float
    memory: float
    recompute: float
    optimizer: float
    imbalance: float
    communication: float  # that hides behind nothing
    host: float  # by which the host is slower than the GPU
    traffic: list[Traffic]
    flops: float  # of all ranks, useful

    @property
    def total(self) -> float:
        return float(sum(getattr(self, name) for name in WAITS))

    @property
    def limits(self) -> list[tuple[str, float]]:
        """What the step waits for and the share of it, largest first."""
        return sorted(((name, getattr(self, name) / self.total) for name in WAITS), key=lambda pair: -pair[1])

    def mfu(self, job: Job, device: Device) -> float:
        return self.flops / (self.total * device.peak * job.ranks)

    def tokens_per_second(self, job: Job) -> float:
        """Of all ranks together."""
        return job.tokens_per_step / self.total


def plan_time(job: Job, device: Device) -> StepTime:
    """One optimizer step of `job` on `device`."""
    tokens = job.tokens * job.accumulation_steps
    peak = device.peak if job.weight_bytes == 2 else device.peak / 8  # fp32 without TF32: the vector units
    dense, expert, head = _products(job, device, peak)
    attention = tokens * _attention_flops(job) / (peak * device.efficiency.attention)
    by_token = _moved(job, device)
    moved, forward = (tokens * each / device.memory_speed for each in (sum(by_token), by_token[0]))
    passes = tokens * job.sizes.num_hidden_layers * moved_again(job) / device.memory_speed
    # A block that is recomputed whole does its forward again, a third of its products; `selective` repeats a few passes.
    whole = forward + (tokens * (dense + expert) + attention) / 3
    again = {"none": 0.0, "selective": passes, "full": whole}[job.activation_checkpointing]
    load = USUAL_LOAD if job.ep_size > 1 else 1.0
    sent = traffic(job, device, load)
    backward = (2 / 3) * (tokens * (dense + expert + head) + attention + moved)
    in_the_open = exposed(sent, backward)
    busy = tokens * (dense + expert + head) + attention + moved + again
    each, once = device.everywhere.host_kernel, device.everywhere.host_step
    host = each * kernels_by_layer(job, device) * job.sizes.num_hidden_layers * job.accumulation_steps + once
    return StepTime(
        matrix=tokens * (dense + expert + head),
        attention=attention,
        memory=moved,
        recompute=again,
        optimizer=optimizer_seconds(job, device),
        imbalance=(load - 1) * tokens * expert,
        communication=in_the_open,
        host=max(0.0, host - busy - in_the_open),
        traffic=sent,
        flops=job.tokens_per_step * training_flops_per_token(job.sizes, job.sequence_length),
    )


def _products(job: Job, device: Device, peak: float) -> tuple[float, float, float]:
    """Seconds a token of the dense products, the routed experts' and the head's, forward and backward."""
    c, reached = job.sizes, device.efficiency
    keys = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    expert = 3 * c.hidden_size * c.moe_intermediate_size

    def share(width: int) -> float:
        return reached.matrix if width >= device.everywhere.narrow_below else reached.narrow

    expert_share, key_share = share(c.moe_intermediate_size), share(c.num_key_value_heads * c.head_dim)
    beside = has_kernel(job, device) or joined(job, device)
    gate_and_up = share((1 + beside) * c.moe_intermediate_size)
    # Several experts on a rank are one grouped product, which reaches less than a plain one at these sizes.
    grouped = 1.0 if job.ep_size == c.n_routed_experts else reached.grouped
    routed_share = grouped / (2 / (3 * gate_and_up) + 1 / (3 * expert_share))
    router = c.n_routed_experts * c.hidden_size
    layer = (attention_matrices(c) - keys + router) / reached.matrix + keys / key_share + expert * c.n_shared_experts / expert_share
    seconds = 6 * c.num_hidden_layers / peak  # 2 operations x (forward + 2 gradients)
    return (
        seconds * layer,
        seconds * expert * c.num_experts_per_tok / routed_share,
        6 * c.vocab_size * c.hidden_size / peak / reached.head,
    )


def _attention_flops(job: Job) -> float:
    """A token's, forward and backward, causal: 2 products x 2 operations x S/2 keys x 3."""
    c = job.sizes
    return 6 * job.sequence_length * c.num_attention_heads * c.head_dim * c.num_hidden_layers


def kernels_by_layer(job: Job, device: Device) -> int:
    """Kernels that the host launches for a layer of one micro-step. A test holds them to the roofline's count."""
    exchanged = job.ep_size > 1
    plain = KERNELS + exchanged * (EXCHANGE_KERNELS + GROUPING_KERNELS * (_local_experts(job) > 1))
    plain -= SPARED_KERNELS * has_kernel(job, device)
    return plain + {"none": 0, "selective": SELECTIVE_KERNELS - exchanged, "full": plain * 9 // 20}[job.activation_checkpointing]


def moved_by_layer(job: Job, device: Device) -> tuple[float, float]:
    """Bytes a token that a layer's passes beside products and exchanges read and write, (forward, backward), with the kernels of
    `model/kernels/`: each reads and writes a row once. A test holds them to `launch/benchmark.py roofline`'s count.

    h hidden, q and a of query and of all heads, r routed rows, i their width, in bytes of the model's type.
    """
    c, w = job.sizes, job.weight_bytes
    h, q = c.hidden_size * w, c.num_attention_heads * c.head_dim * w
    a = q + c.num_key_value_heads * c.head_dim * w
    r = c.num_experts_per_tok * c.hidden_size * w
    i = (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size * w
    # norms 2h and 4h, q/k norm with RoPE 2a, sinks 2q, router h, rows h + r, SwiGLU 3i, their sum r + 3h
    forward: float = 11 * h + 2 * a + 2 * q + 2 * r + 3 * i
    # their sum h + r, SwiGLU 5i, rows r + 3h, router 4h, norms 4h each, sinks 2q, q/k norm with RoPE 3a
    backward: float = 16 * h + 3 * a + 2 * q + 2 * r + 5 * i
    if job.zero_stage == 3:  # q, k and v are three modules, whose input gradients are added up
        backward += 6 * h
    if joined(job, device):  # gate and up: their weights copied in the forward and in the backward, there their gradient too
        copied = 4 * _local_experts(job) * c.moe_intermediate_size * c.hidden_size * w / job.tokens
        forward, backward = forward + copied, backward + 2 * copied
    elif not has_kernel(job, device):  # each product's input gradient apart, and their sum
        backward += 3 * r
    if job.ep_size > 1 and _local_experts(job) > 1:  # grouped by expert where they arrive, and the results back
        forward, backward = forward + 4 * r, backward + 4 * r
    return forward, backward


def has_kernel(job: Job, device: Device) -> bool:
    """Whether the experts multiply by `model/kernels/grouped.py`, gate and up in one launch without a copy: `model.grouped`."""
    c = job.sizes
    return device.efficiency.lacks_grouped_mm and fits_kernel(_local_experts(job), (c.hidden_size, c.moe_intermediate_size))


def joined(job: Job, device: Device) -> bool:
    """Whether gate and up are copied to be one product: `model.dispatch.joined`."""
    c, rows = job.sizes, job.tokens * job.sizes.num_experts_per_tok
    return not has_kernel(job, device) and joining_pays(_local_experts(job), 2 * c.moe_intermediate_size, rows)


def _local_experts(job: Job) -> int:
    return job.sizes.n_routed_experts // job.ep_size


def moved_again(job: Job) -> float:
    """Bytes a token that a layer's `selective` passes read and write: two norms, q/k norm with RoPE, SwiGLU, and the rows where
    they come from no other rank."""
    c, w = job.sizes, job.weight_bytes
    turned = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim if c.qk_norm else 0
    width = (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size
    rows = (1 + c.num_experts_per_tok) * c.hidden_size if job.ep_size == 1 else 0
    return float(w * (4 * c.hidden_size + 2 * turned + 3 * width + rows))


def _moved(job: Job, device: Device) -> tuple[float, float]:
    """Of all layers and the loss: a chunk's logits three times, its share of the head's gradient (fp32) four times."""
    c, (forward, backward) = job.sizes, moved_by_layer(job, device)
    loss = 3 * c.vocab_size * job.weight_bytes + 4 * FP32 * c.vocab_size * c.hidden_size / chunk_rows(job)
    return c.num_hidden_layers * forward + loss, c.num_hidden_layers * backward


def exposed(sent: list[Traffic], backward: float) -> float:
    """Seconds that nothing hides: all that has nothing to go on beside, and the rest beyond the backward's length."""
    hidden = sum(one.seconds for one in sent if one.hidden_by == "backward")
    in_the_open = sum(one.seconds for one in sent if not one.hidden_by)
    return in_the_open + max(0.0, hidden - HIDING * backward) + (1 - HIDING) * min(hidden, backward)


def optimizer_seconds(job: Job, device: Device) -> float:
    """Passes over gradients and state, of an optimizer step."""
    gradients = (HELD_BYTES * job.local_parameters + SHARD_BYTES * job.shard) * job.accumulation_steps / device.memory_speed
    if not job.offloads_optimizer:
        return gradients + STEP_BYTES * job.shard / device.memory_speed
    return gradients + job.shard * (4 + 2) / PCIE_SPEED + 28 * job.shard / HOST_MEMORY_SPEED
