"""Are the experts used? Collapse, and router logits that grow.

Shapes: N logged steps, Y layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from launch.reporting.checks import LEAST_ROWS, Flag, some_steps
from launch.reporting.columns import Floats
from launch.reporting.curves import per_layer_columns
from launch.reporting.read import Run

NEAR_WORST = 0.65  # of the imbalance there would be if all tokens went to the same top-k experts
CROWDED = 1.0  # max_vio: the busiest expert has twice its share
FALLING = 0.7  # of its highest: an imbalance that goes down is the start of every run
LARGE_LOGITS, GROWTH = 20.0, 1.5  # RMS, and over that of the first half


def collapsed_experts(run: Run) -> Iterator[Flag]:
    layers = per_layer_columns(run.train)
    experts, top_k = _experts(run)
    unused_Y = _late_mean(layers.get("unused_experts"))
    dead = [layer for layer, share in enumerate(unused_Y.tolist()) if share * (experts or 1) > 0.5]
    if dead:
        layer = int(np.argmax(unused_Y))
        count = f"{unused_Y[layer] * experts:.1f} of {experts}" if experts else f"{unused_Y[layer]:.0%}"
        word = "layer" if len(dead) == 1 else "layers"
        detail = f"Experts without a token in {word} {some_steps(dead)}; in layer {layer} it is {count} on average lately."
        yield Flag(level="bad", title="Collapsed experts", detail=detail, advice=_advice(run))
        return
    vio_NY = layers.get("max_vio")
    if vio_NY is None or len(vio_NY) < LEAST_ROWS:
        return
    vio_Y, worst = _late_mean(vio_NY), experts / top_k - 1 if experts else math.inf
    layer = int(np.argmax(vio_Y))
    highest = max(float(_late_mean(part_NY)[layer]) for part_NY in np.array_split(vio_NY, 10))
    if vio_Y[layer] < min(CROWDED, NEAR_WORST * worst) or vio_Y[layer] < FALLING * highest:
        return
    collapsing = vio_Y[layer] > NEAR_WORST * worst
    yield Flag(
        level="bad" if collapsing else "look",
        title="The experts collapse" if collapsing else "The experts' load is uneven",
        detail=f"max_vio is {vio_Y[layer]:.2f} in layer {layer}, of {worst:.2f} if every token chose the same experts.",
        advice=_advice(run),
    )


def _advice(run: Run) -> str:
    bias_NY = run.train.layers.get("bias_range")
    if bias_NY is not None and len(bias_NY) and not bias_NY.any():
        return "Balancing is off, for the bias stands still: set router_balance or router_bias_rate in the model's config.json."
    return (
        "Raise the balancing rate (router_bias_rate in the model's config.json: 0.01 for short runs), balance by quantiles "
        "(router_balance), or lower the learning rate: routers that learn faster than the bias moves run away from it."
    )


def _experts(run: Run) -> tuple[int, int]:
    model = run.config.get("model")
    model = model if isinstance(model, dict) else {}
    experts, top_k = model.get("n_routed_experts"), model.get("num_experts_per_tok")
    return (experts, top_k) if isinstance(experts, int) and isinstance(top_k, int) and top_k > 0 else (0, 1)


def _late_mean(column_NY: Floats | None) -> Floats:
    if column_NY is None or not len(column_NY):
        return np.zeros(0)
    late_NY = column_NY[-max(5, len(column_NY) // 10) :]
    finite_NY = np.isfinite(late_NY)
    mean_Y: Floats = np.where(finite_NY, late_NY, 0.0).sum(axis=0) / np.maximum(1, finite_NY.sum(axis=0))
    return mean_Y


def logits_grow(run: Run) -> Iterator[Flag]:
    column_NY = run.train.layers.get("router_logit_rms")
    if column_NY is None or len(column_NY) < LEAST_ROWS:
        return
    middle_Y, late_Y = _late_mean(column_NY[: len(column_NY) // 2]), _late_mean(column_NY)
    layer = int(np.argmax(late_Y))
    if late_Y[layer] > LARGE_LOGITS and late_Y[layer] > GROWTH * middle_Y[layer]:
        yield Flag(
            level="look",
            title="The router's logits grow",
            detail=f"Their RMS in layer {layer} is {late_Y[layer]:.1f}, after {middle_Y[layer]:.1f} half-way.",
            advice="Logits that grow without end come before instability: lower the learning rate, or decay the router's weights.",
        )
