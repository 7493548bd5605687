"""Load balancing without an auxiliary loss, by the correction bias; `router_balance` in the model's configuration says how:

    sign          DeepSeek-V3's step (arXiv 2408.15664), made zero-mean
    proportional  a step by how far the load is off, not by its sign alone
    quantile      the bias that would have evened the step's load (`quantile.py`)
    none          the bias stays as it is

Shapes: E experts, Y layers, N bins of a histogram.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import MoEGPTConfig
from .quantile import quantile_step
from .router import Router


def bias_step(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """`bias + rate * (s - mean(s))` with `s = sign(mean_load - load)`: up for the underused, down for the overused.

    bias `[..., E]` fp32, load `[..., E]` integer tokens of one optimizer step over all ranks and micro-batches.
    The paper adds `rate * s`; without the mean of s taken off, a layer's biases drift together when most experts lie
    on one side of the mean load. The choice of experts sees only their differences, so it is the same.
    Comparing `load * E` with the sum keeps the sign exact, and no load at all moves nothing.
    """
    excess_E = load_E.sum(dim=-1, keepdim=True) - load_E * load_E.shape[-1]
    sign_E = torch.sign(excess_E).to(bias_E.dtype)
    return bias_E + rate * (sign_E - sign_E.mean(dim=-1, keepdim=True))


def proportional_step(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """`bias + rate * (mean_load - load) / mean_load`: the variant of arXiv 2408.15664 that adds the violation and not its sign.

    Shapes as in `bias_step`. The paper adds `rate * (mean_load - load)`; over the mean load the rate does not depend on the
    tokens of a step. It is zero-mean by itself, at most `rate * (E - 1)` long, and no load at all moves nothing.
    """
    total_E = load_E.sum(dim=-1, keepdim=True)
    excess_E = (total_E - load_E * load_E.shape[-1]).double() / total_E.clamp(min=1)
    return (bias_E + rate * excess_E).to(bias_E.dtype)


# The sum of squared router logits travels as an integer beside the loads, so that one all-reduce is enough.
SQUARE_UNIT = 1024


class LoadBalancer:
    """Owns the correction biases of all routers: one all-reduce and one in-place update per optimizer step."""

    def __init__(
        self,
        model: nn.Module | Sequence[Router],
        rate: float,
        all_reduce: Callable[[Tensor], object] | None = None,
        *,
        rule: str = "sign",
        decay: float = 0.0,
        average: float = 0.0,
    ) -> None:
        """`all_reduce` sums a tensor over all data-parallel ranks in place; None on one rank.

        The rest is the configuration's `router_balance`, `router_bias_rate`, `_decay` and `_average`; rate 0 only measures, but for
        `quantile`, which has none.
        """
        modules = model.modules() if isinstance(model, nn.Module) else model
        self.routers = [module for module in modules if isinstance(module, Router)]
        if not self.routers:
            raise ValueError("there is no router to balance in this model")
        if rule == "quantile" and any(router.lift_EN is None for router in self.routers):
            raise ValueError("quantile balancing needs a model with router_balance 'quantile': its routers count what it needs")
        self.rule, self.rate, self.decay, self.average, self.all_reduce = rule, rate, decay, average, all_reduce
        #: Tokens of each expert in the last step, over all ranks.
        self.load_YE: Tensor | None = None

    @classmethod
    def of(
        cls, config: MoEGPTConfig, model: nn.Module | Sequence[Router], all_reduce: Callable[[Tensor], object] | None = None
    ) -> "LoadBalancer":
        """As the configuration says."""
        rule, decay, average = config.router_balance, config.router_bias_decay, config.router_bias_average
        return cls(model, config.router_bias_rate, all_reduce, rule=rule, decay=decay, average=average)

    @torch.no_grad()
    def step(self, *, measure: bool = True, progress: float = 0.0) -> dict[str, list[float]]:
        """Balances by what was counted since the last call, zeroes it, and returns per-layer health (`router_health`).

        `measure` False returns none of it: the host need not wait for the device. `progress`: the part of the run that is done.
        """
        load_YE, square_Y, lift_YEN = self._counted()
        self.load_YE = load_YE
        bias_YE = torch.stack([router.e_score_correction_bias for router in self.routers])
        bias_YE = self._next_bias(bias_YE, load_YE, lift_YEN, progress)
        for router, bias_E in zip(self.routers, bias_YE, strict=True):
            # In place: the engine and the checkpoint hold this very buffer.
            router.e_score_correction_bias.copy_(bias_E)
        self.reset()
        if not measure:
            return {}
        return router_health(load_YE, bias_YE, square_Y, self.routers[0].settings["top_k"])

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(load_YE, square_Y, lift_YEN)` of all ranks, the last empty but for quantiles. One exact sum of integers."""
        layers, experts = len(self.routers), self.routers[0].num_experts
        load_YE = torch.stack([router.load_E for router in self.routers])
        square_Y = torch.stack([router.logit_square_sum for router in self.routers])
        parts = [load_YE, (square_Y * SQUARE_UNIT).long().unsqueeze(1)]
        if self.rule == "quantile":
            parts.append(torch.stack([router.lift_EN.flatten() for router in self.routers if router.lift_EN is not None]))
        counted = torch.cat(parts, dim=1)
        if self.all_reduce is not None:
            self.all_reduce(counted)
        lift_YEN = counted[:, experts + 1 :].reshape(layers, experts, -1)
        return counted[:, :experts], counted[:, experts] / SQUARE_UNIT, lift_YEN

    def _next_bias(self, bias_YE: Tensor, load_YE: Tensor, lift_YEN: Tensor, progress: float) -> Tensor:
        if self.rule == "quantile":
            return quantile_step(bias_YE, lift_YEN, self.routers[0].settings["top_k"] / load_YE.shape[1], self.average)
        if self.rule == "none" or not self.rate:
            return bias_YE
        step = proportional_step if self.rule == "proportional" else bias_step
        return step(bias_YE, load_YE, self.rate * (1 - self.decay * min(1.0, progress)))

    def reset(self) -> None:
        """Forgets what was counted (in a skipped step, say)."""
        for router in self.routers:
            router.forget()


def router_health(load_YE: Tensor, bias_YE: Tensor, square_Y: Tensor, top_k: int) -> dict[str, list[float]]:
    """One number per layer of what shows a collapsing router before the loss does; one host synchronisation.

    load_max_over_mean: 1 is even, E is all tokens to one expert. load_entropy: of the load's distribution over log E,
    1 is even, 0 is one expert. unused_experts: share of experts without a token. bias_range: max - min.
    router_logit_rms: root mean square of the router's logits, which grows without bound in an unstable run.
    """
    load_YE = load_YE.double()
    experts, routed_Y = load_YE.shape[1], load_YE.sum(dim=1).clamp(min=1)
    share_YE = load_YE / routed_Y.unsqueeze(1)
    numbers = {
        "load_max_over_mean": share_YE.amax(dim=1) * experts,
        "load_entropy": -torch.xlogy(share_YE, share_YE).sum(dim=1) / math.log(max(experts, 2)),
        "unused_experts": (load_YE == 0).double().mean(dim=1),
        "bias_range": (bias_YE.amax(dim=1) - bias_YE.amin(dim=1)).double(),
        "router_logit_rms": (square_Y.double() * top_k / (routed_Y * experts)).sqrt(),
    }
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
