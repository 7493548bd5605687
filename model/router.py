"""The router: fp32 logits, DeepSeek-V3's group-limited choice, its replay in recomputation, and the load counters.

Shapes: T tokens, H hidden, E experts, K experts per token, N bins.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .auxiliary import AuxiliaryLoss, balance_loss
from .choice import group_limited_topk
from .config import MoEGPTConfig
from .operators import fills_tile, ops, usable
from .quantile import BINS, add_to_histogram, bias_lift
from .rebuild import rebuildable
from .replay import RouterReplay


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """`[T, E]` in fp32 (float64 stays), whatever dtype the engine trains in: bf16 logits move tokens near a tie."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    with maybe_autocast(x_TH.device.type, enabled=False):  # which would multiply in bf16 all the same
        return F.linear(rebuildable(x_TH.to(dtype), partial(torch.Tensor.to, dtype=dtype), x_TH), weight_EH.to(dtype))


def expert_scores(logits_TE: Tensor, scoring_func: str) -> Tensor:
    return logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    replay_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(weights_TK, indices_TK)`: DeepSeek-V3's group-limited choice (arXiv 2412.19437, section 2.1.2).

    The bias takes part in the choice only; the weights are the unbiased scores of the chosen experts.
    `replay_TK` gives the choice of an earlier forward instead, so that a recomputation cannot choose anew.
    """
    scores_TE = expert_scores(logits_TE, scoring_func)
    indices_TK = replay_TK
    if indices_TK is None:
        indices_TK = group_limited_topk(scores_TE.detach() + bias_E, top_k, n_group, topk_group)
    weights_TK = scores_TE.gather(1, indices_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * routed_scaling_factor, indices_TK


def tokens_per_expert(indices_TK: Tensor, experts: int) -> Tensor:
    """int64 `[E]`: tokens sent to each expert. Not `bincount`, which waits for a CUDA device to learn its own size."""
    return (indices_TK.flatten().unsqueeze(1) == torch.arange(experts, device=indices_TK.device)).sum(dim=0)


class RouteSettings(TypedDict):
    """The keywords of `route`."""

    top_k: int
    n_group: int
    topk_group: int
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float


class Router(nn.Module):
    """Routing settings, correction bias and load counters; a subclass says where its projection lies.

    `load_E` counts the tokens sent to each expert by training forwards since it was last zeroed (`balance`), `lift_EN` their
    `quantile.bias_lift`, for quantile balancing only.
    """

    e_score_correction_bias: Tensor
    load_E: Tensor
    lift_EN: Tensor | None
    logit_square_sum: Tensor

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        self.num_experts, self.aux_loss_coef = config.n_routed_experts, config.router_aux_loss_coef
        self.settings: RouteSettings = {
            "top_k": config.num_experts_per_tok,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "scoring_func": config.scoring_func,
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
        }
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self.register_buffer("load_E", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("logit_square_sum", torch.zeros((), dtype=torch.float32), persistent=False)
        by_quantile = config.router_balance == "quantile"
        lift_EN = torch.zeros(self.num_experts, BINS, dtype=torch.int64) if by_quantile else None
        self.register_buffer("lift_EN", lift_EN, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """`.to`, `.bfloat16()` and the like move the buffers but never cast them: bf16 loses a bias step of 0.001."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def projection(self) -> Tensor:
        """The router's weight `[E, H]`."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, logits_TE: Tensor, counts_E: Tensor) -> None:
        """Adds one forward's load and logits to the counters; no host synchronisation."""
        self.load_E += counts_E
        self.logit_square_sum += logits_TE.square().sum()
        if self.lift_EN is not None:
            bias_E, made = self.e_score_correction_bias, self.settings
            if self._fits_kernel(logits_TE):
                choice = made["top_k"], made["n_group"], made["topk_group"]
                ops.add_lift_(self.lift_EN, logits_TE, bias_E, *choice, made["scoring_func"] == "sigmoid")
                return
            scores_TE = expert_scores(logits_TE, made["scoring_func"])
            lift_TE = bias_lift(scores_TE, bias_E, top_k=made["top_k"], n_group=made["n_group"], topk_group=made["topk_group"])
            add_to_histogram(self.lift_EN, lift_TE, bias_E)

    def forget(self) -> None:
        """Zeroes the counters."""
        for counter in (self.load_E, self.logit_square_sum, self.lift_EN):
            if counter is not None:
                counter.zero_()

    def forward(self, x_TH: Tensor, _unused: object = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(weights_TK fp32, indices_TK, counts_E, x_TH)`; whoever goes on with that x has its gradient added up in the router's.

        AutoEP passes a second argument, a bias of its own: None.
        """
        replay = RouterReplay.current()
        replaying = replay is not None and replay.replaying
        replay_TK = replay.next_choice() if replay is not None and replaying else None
        chosen = self._fused if self._fits_kernel(x_TH) else self._plain
        weights_TK, indices_TK, counts_E, logits_TE, x_TH = chosen(x_TH, replay_TK)
        if replay is not None and not replaying:
            replay.choices.append(indices_TK)
        if self.training and not replaying:
            self.observe(logits_TE, counts_E)
        return weights_TK, indices_TK, counts_E, x_TH

    def _plain(self, x_TH: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, ...]:
        logits_TE = router_logits(x_TH, self.projection())
        weights_TK, indices_TK = route(logits_TE, self.e_score_correction_bias, replay_TK=replay_TK, **self.settings)
        counts_E = tokens_per_expert(indices_TK, self.num_experts)
        if self.training and self.aux_loss_coef:
            scores_TE = expert_scores(logits_TE, self.settings["scoring_func"])
            weights_TK = AuxiliaryLoss.apply(  # type: ignore[no-untyped-call]
                weights_TK, self.aux_loss_coef * balance_loss(scores_TE, counts_E)
            )
        return weights_TK, indices_TK, counts_E, logits_TE, x_TH

    def _fits_kernel(self, x_TH: Tensor) -> bool:
        """Experts and groups are powers of two, as tiles of the kernel are, and a token's experts fit in registers."""
        sizes = self.num_experts, self.settings["n_group"]
        if self.aux_loss_coef or not usable(x_TH):
            return False
        return fills_tile(*sizes) and self.num_experts <= 128

    def _fused(self, x_TH: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, ...]:
        routed: tuple[Tensor, ...] = FusedRoute.apply(  # type: ignore[no-untyped-call]
            x_TH, self.projection(), self.e_score_correction_bias, replay_TK, self.settings
        )
        return routed


class FusedRoute(torch.autograd.Function):
    """`router_logits`, `route` and the counts by the kernels; keeps x as it is and the logits."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, replay_TK: Tensor | None, settings: RouteSettings
    ) -> tuple[Tensor, ...]:
        ctx.rule = settings["scoring_func"] == "sigmoid", settings["norm_topk_prob"], settings["routed_scaling_factor"]
        choice = settings["top_k"], settings["n_group"], settings["topk_group"]
        weights_TK, indices_TK, counts_E, logits_TE = ops.route(x_TH, weight_EH, bias_E, replay_TK, *choice, *ctx.rule)
        ctx.save_for_backward(x_TH, weight_EH, logits_TE, indices_TK)
        ctx.mark_non_differentiable(indices_TK, counts_E, logits_TE)
        ctx.set_materialize_grads(False)
        return weights_TK, indices_TK, counts_E, logits_TE, x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx: Any, dweights_TK: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        dbeside_TH = others[-1]
        if dweights_TK is None:
            return dbeside_TH, None, None, None, None
        x_TH, weight_EH, logits_TE, indices_TK = ctx.saved_tensors
        given = x_TH, weight_EH, logits_TE, indices_TK
        return *ops.route_backward(dweights_TK, dbeside_TH, *given, *ctx.rule), None, None, None


class Gate(Router):
    """The router as transformers' Glm4Moe stores it: `mlp.gate.weight`, `mlp.gate.e_score_correction_bias`."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def projection(self) -> Tensor:
        return self.weight
