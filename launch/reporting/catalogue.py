"""What the metrics are called on the page, in what order, and what each says in a sentence. `launch/METRICS.md` says more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A chart of its own. `log`: drawn on a log axis at first; `layers`: one number per layer."""

    key: str
    group: str
    title: str
    help: str
    unit: str = ""
    log: bool = False
    layers: bool = False


def _metrics(group: str, *rows: tuple[str, str, str, str], log: tuple[str, ...] = (), layers: bool = False) -> list[Metric]:
    return [Metric(key=k, group=group, title=t, unit=u, help=h, log=k in log, layers=layers) for k, t, u, h in rows]


METRICS: tuple[Metric, ...] = (
    *_metrics(
        "Learning",
        ("loss", "Loss", "nats per token", "Training loss of each step's batch; dots are the validation split."),
        ("val_bits_per_byte", "Validation, bits per byte", "bits", "Comparable between tokenizers, which the loss is not."),
        ("perplexity", "Perplexity", "", "exp(loss): the number of tokens it hesitates between."),
        ("grad_norm", "Gradient norm", "", "Before clipping. Steady or slowly falling is healthy; over 10 is not."),
        ("clipped_share", "Clipped steps", "share", "Of the steps since the last line. Over half: the clip sets the step size."),
        ("lr", "Learning rate", "", "What the schedule gave."),
        log=("perplexity", "grad_norm"),
    ),
    *_metrics(
        "Experts",
        (
            "max_vio",
            "Load imbalance (max_vio)",
            "",
            "Busiest expert's load over the mean, less 1. 0 is even.",
        ),
        ("max_vio_window", "Load imbalance over a window", "", "The same over the last steps' tokens together: lasting imbalance."),
        ("min_vio", "Idlest expert (min_vio)", "", "1 less the idlest expert's load over the mean. 1: it gets nothing."),
        ("load_entropy", "Entropy of the load", "of the maximum", "1 is even, 0 is one expert."),
        ("unused_experts", "Unused experts", "share", "Experts without a single token in a step."),
        ("bias_range", "Range of the balancing bias", "", "Largest less smallest. One that only grows cannot catch up."),
        ("router_logit_rms", "Size of the router's logits", "RMS", "Growth without end comes before instability."),
        ("attention_sink_mass", "Attention on the sink", "share", "What a query gives to no token at all."),
        layers=True,
    ),
    *_metrics(
        "Speed",
        ("tokens_per_second", "Throughput", "tokens/s", "All ranks together, evaluation and saving not counted."),
        ("mfu", "Model FLOPs utilization", "of peak", "What the model needs over what the devices could do."),
        (
            "memory_gb",
            "Device memory, peak",
            "GB",
            "The most that any rank has held so far: on a GPU in training, on a CPU since its start.",
        ),
        ("data_seconds", "Waiting for data", "s a step", "Should stay far below the step's time."),
        ("step_seconds", "Time of a step", "s", "Without evaluation and saving."),
        ("save_seconds", "Training stood still to save", "s", "In the background only the copy counts."),
    ),
)
BY_KEY = {metric.key: metric for metric in METRICS}
UPDATES = "update_to_weight"  # : and the group's name
GROUPS = ("Learning", "Experts", "Speed", "More")
#: In every row and no curve: positions and what has a place of its own.
NOT_DRAWN = frozenset({"step", "samples", "tokens", "time", "skipped_samples", "load_max_over_mean", "val_loss"})


def describe(key: str, *, layers: bool) -> Metric:
    """The catalogue's entry; a metric that it does not know gets a chart under its own name."""
    if key.startswith(UPDATES):
        group = key.removeprefix(UPDATES).lstrip(": ")
        says = "How far a step moves a group. About 1e-3 is usual."
        return Metric(key=key, group="Learning", title=f"Update over weights: {group}", help=says, log=True)
    return BY_KEY.get(key) or Metric(key=key, group="More", title=key.replace("_", " "), help="", layers=layers)
