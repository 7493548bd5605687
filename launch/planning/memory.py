"""What a rank needs at its fullest moment, by part. Bytes; DeepSpeed 0.19.8's layout, read in its source and counted on an engine.

Two moments of training can be the fullest: the backward of the last micro-batch, and the optimizer's step after it. Before them
every rank builds the whole model in fp32, of which it keeps its own experts, in its weights' type.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launch.planning.activations import kept_activations
from launch.planning.job import Job
from model.accounting import built_parameters

GB = 1e9
FP32 = 4
#: CUDA context with cuBLAS's and NCCL's buffers, and what the allocator holds beyond the live tensors. Assumption: contexts of
#: 0.5 and channels of about 1 GB as nvidia-smi shows on an eight-GPU node; fragments as torch reports with expandable segments.
CONTEXT_BYTES, FRAGMENT_SHARE = 1.5e9, 0.04
#: Elements that are reduced at a time by BF16_Optimizer and without ZeRO (`elements_per_buffer` in deepspeed/runtime/engine.py).
REDUCED_AT_ONCE = 500_000_000
#: An expert-parallel rank's share of the routed rows when routing goes wrong, over the even share; bounded by all rows of all.
WORST_LOAD = 3.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. `total`, the sum, is its fullest moment; `worst` is what comes on top at `WORST_LOAD`."""

    weights: float
    gathered: float  # ZeRO-3: other ranks' weights, while they are needed
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    loss: float
    working: float  # a block's backward: what is recomputed for it, and its temporaries
    exchange: float
    step: float  # temporaries of the optimizer's step
    not_at_once: float  # of the parts above, what is never there at the same time; 0 or less
    build: float  # what the whole model takes beyond training, before its experts are spread over the ranks
    runtime: float
    worst: float
    host: float  # with offload, optimizer state and gradients in host memory

    @property
    def live(self) -> float:
        """Of the tensors alone, as it trains."""
        return self.total - self.runtime - self.build

    @property
    def total(self) -> float:
        return float(sum(value for name, value in asdict(self).items() if name not in ("worst", "host")))

    def in_gb(self) -> dict[str, float]:
        """GB (10^9 bytes) by part, for `--json`."""
        return {**{name: round(value / GB, 4) for name, value in asdict(self).items()}, "total": round(self.total / GB, 4)}


def plan_memory(job: Job, *, on_gpu: bool = True) -> Memory:
    """`on_gpu=False` is what a CPU holds: without kernels of ours, and no context."""
    parts = _parts(job, on_gpu, load=1.0)
    fullest, whole = _fullest(job, parts), FP32 * built_parameters(job.sizes, job.ep_size)
    # At most all rows of its expert group come to one rank.
    loaded = _fullest(job, _parts(job, on_gpu, load=min(WORST_LOAD, job.ep_size)))
    return Memory(
        **parts,
        not_at_once=fullest - sum(parts.values()),
        build=max(0.0, whole - fullest),
        runtime=CONTEXT_BYTES + FRAGMENT_SHARE * fullest if on_gpu else 0.0,
        worst=max(loaded, whole) - max(fullest, whole),
        host=_optimizer(job) + job.shard * job.master_bytes if job.offloads_optimizer else 0.0,
    )


def _parts(job: Job, on_gpu: bool, load: float) -> dict[str, float]:
    """The parts of a `Memory` that are tensors, for `load` times the even share of routed rows."""
    kept = kept_activations(job, kernels=on_gpu, load=load)
    return {
        "weights": (job.shard if job.zero_stage == 3 else job.local_parameters) * job.weight_bytes,
        "gathered": _gathered(job),
        "gradients": _gradients(job),
        "optimizer": 0.0 if job.offloads_optimizer else _optimizer(job),
        "buckets": _buckets(job) + _flattened(job),
        "activations": kept.held,
        "loss": kept.loss,
        "working": kept.recomputed + kept.working,
        "exchange": load * exchange_bytes(job, on_gpu),
        "step": _step(job),
    }


def _fullest(job: Job, parts: dict[str, float]) -> float:
    """The most of them that is there at a time."""
    always, held, buckets = parts["weights"] + parts["optimizer"], parts["activations"], _buckets(job)
    head = _head(job)
    block = parts["working"] + parts["exchange"]
    # Stages 1 and 2 make their buckets when a backward begins; forward and loss are over by then. Stage 3 gathers weights into one
    # buffer and copies each out of it; the buffer stays for the blocks' forward, but not for the loss.
    arriving = min(parts["gathered"], job.prefetched * job.weight_bytes)
    forward = max(parts["loss"], arriving) + (buckets if job.zero_stage == 3 else 0.0)
    # A head that is the embedding as well has its gradient last: what the loss gave to it lies beside the buckets till then.
    waiting = head * job.weight_bytes if job.sizes.tie_word_embeddings else 0.0
    begin = parts["gathered"] + _held(job) + held + max(forward, buckets + block + waiting)
    # ZeRO-2 makes room for all of its shard's gradients when the first bucket is full: after the head's, which may be more than
    # that alone and then lies beside it, and those of as many layers as still go in.
    before = 0 if waiting else head
    gone = min(1.0, max(0, job.bucket_elements - before) / (job.local_parameters - job.embeddings))
    flushing = parts["gradients"] + buckets + held * (1 - gone) + block + (waiting or _beside(job))
    flushing = flushing if job.zero_stage == 2 else 0.0
    # In the last block's backward all gradients are there but the embedding's; then they are copied.
    last = max(block - head * job.weight_bytes, _flattened(job)) if job.zero_stage < 3 else 0.0
    end = parts["gradients"] + buckets + last
    stepping = remaining_gradients(job) + parts["step"] + (buckets if job.zero_stage == 3 else 0.0)
    return always + max(begin, flushing, end, stepping)


def _head(job: Job) -> int:
    """Elements of the largest parameter."""
    return job.sizes.vocab_size * job.sizes.hidden_size


def _beside(job: Job) -> float:
    """The head's gradient where no bucket holds it."""
    return _head(job) * job.weight_bytes if _head(job) > job.bucket_elements else 0.0


def _gathered(job: Job) -> float:
    """ZeRO-3 keeps what it will need again soon, up to a limit that small models do not reach. What one rank alone holds is
    not gathered."""
    if job.zero_stage < 3:
        return 0.0
    dense = job.dense_parameters if job.ranks > 1 else 0
    experts = job.expert_parameters if job.ranks > job.ep_size else 0
    return min(dense + experts, job.live_parameters) * job.weight_bytes


def _gradients(job: Job) -> float:
    """After a backward. ZeRO-1 sums all of them on every rank, beside each parameter's own where the two differ in type
    (DeepSpeed's BF16_Optimizer does it then, without buckets); 2 and 3 keep a shard."""
    if job.zero_stage >= 2:
        return 0.0 if job.offloads_optimizer else job.shard * job.gradient_bytes
    return job.local_parameters * (job.weight_bytes + _summed_apart(job))


def remaining_gradients(job: Job) -> float:
    """When the optimizer's step begins. Where they are not summed apart Muon's updates and its next momentum lie beside them."""
    muons = 2 * _matrices(job) * job.weight_bytes if job.is_muon and not _summed_apart(job) else 0.0
    if job.zero_stage == 1 and not _summed_apart(job):
        return job.shard * job.gradient_bytes + muons  # each rank has kept what is its own to step
    return _gradients(job) + muons


def _held(job: Job) -> float:
    """Of the gradients, what is there when a step's last backward begins."""
    if job.zero_stage == 3:
        return _gradients(job)  # one buffer, made at the start
    if job.zero_stage < 2 and _summed_apart(job):
        return job.local_parameters * (job.gradient_bytes + (job.weight_bytes if job.accumulation_steps > 1 else 0))
    return _gradients(job) if job.accumulation_steps > 1 else 0.0


def _summed_apart(job: Job) -> int:
    """Bytes of a gradient's sum where ZeRO keeps it in another type than the parameter's."""
    return job.gradient_bytes if job.gradient_bytes != job.weight_bytes else 0


def _optimizer(job: Job) -> float:
    """Masters, which without ZeRO fp32 weights are themselves, and moments. Of Muon's matrices that is one, in their gradients'
    type: ZeRO-2 steps by the parameters' own. Not counted: it is whole for a matrix of which a rank steps a part."""
    own = job.master_bytes if job.zero_stage == 0 and job.weight_bytes == FP32 else 0
    adams = job.shard * (job.master_bytes + job.moments * job.moment_bytes - own)
    momentum = job.gradient_bytes if job.zero_stage == 1 else job.weight_bytes
    return adams - (_matrices(job) * (job.moments * job.moment_bytes - momentum) if job.is_muon else 0.0)


def _matrices(job: Job) -> float:
    """Of the shard, what Muon steps: all but embedding and head, and vectors, which are too few to count."""
    return job.shard - job.embeddings / (job.ranks if job.zero_stage else 1)


def _buckets(job: Job) -> float:
    """Where gradients are gathered to be reduced."""
    if job.zero_stage == 0 or (job.zero_stage == 1 and _summed_apart(job)):
        return 0.0
    return job.buckets * job.bucket_elements * job.weight_bytes


def _flattened(job: Job) -> float:
    """What is copied on gradients' way to their sums. ZeRO-2: a bucket, or a head that is more than one, flat, and one parameter
    after the other in the sums' type. ZeRO-1: at the end its shard; where sums are apart, and without ZeRO, the dense gradients and
    then the experts' flat, and in the first case once more in the type that is sent."""
    if job.zero_stage == 2 and _summed_apart(job):
        flat = min(max(job.bucket_elements, _head(job)), job.local_parameters)
        return flat * job.weight_bytes + _head(job) * job.gradient_bytes + _beside(job)
    if job.zero_stage == 0 or (job.zero_stage == 1 and _summed_apart(job)):
        flat = min(max(job.dense_parameters, job.expert_parameters), REDUCED_AT_ONCE)
        return flat * (_summed_apart(job) + job.weight_bytes)
    return job.shard * FP32 if job.zero_stage == 1 else 0.0


def exchange_bytes(job: Job, kernels: bool) -> float:
    """The all-to-all's landing buffer of one layer at an even load; without kernels there and back."""
    if job.ep_size == 1:
        return 0.0
    return (1 if kernels else 2) * job.tokens * job.sizes.num_experts_per_tok * job.sizes.hidden_size * job.weight_bytes


def _step(job: Job) -> float:
    """Of one parameter group after the other: its gradients once more, flat and in the masters' type (sums of their own are that
    already), and Adam's root and quotient where it is not one kernel, with Muon of embedding and head alone. Without ZeRO the
    masters have their gradients all at once."""
    if job.offloads_optimizer:
        return 0.0
    if job.zero_stage == 0:
        again = job.local_parameters if job.weight_bytes < FP32 else 0
        return FP32 * (again + (0 if job.fused_optimizer else 2 * max(job.dense_parameters, job.expert_parameters)))
    group = max(job.dense_parameters, job.expert_parameters * job.ep_size) / job.ranks
    flat = 0 if job.zero_stage < 3 and _summed_apart(job) else 1
    adams = job.embeddings / job.ranks if job.is_muon else group
    return job.master_bytes * max(group * flat, adams * (flat + (0 if job.fused_optimizer else 2)))
