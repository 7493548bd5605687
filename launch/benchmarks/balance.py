"""What part of max_vio is the step's own tokens: a trained router's violation under biases that know more or less of them.

python launch/export.py --checkpoint runs/first --output hf/
python launch/benchmark.py balance --model hf/ --data shards/ --tokens_a_step 4096 16384 65536 --output balance.json

The weights stand still and the scores are computed once, under the model's own biases; then each rule goes through the same steps.

    constant   the best bias there is for all steps together: what is left is how one step's tokens differ from all
    shuffled   the same bias, over tokens drawn one by one and not by the row: the noise of counting alone
    average a  as `router_balance: quantile` trains, of the old bias a part a kept: 0 is the quantiles of the step before
    own        the step's own quantiles, which no rule can know before it routes

Training adds the router's own movement from step to step.

Shapes: T tokens, E experts, Y layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cli import UserError
from data.dataset import PackedDataset
from data.terminal import Progress
from launch.evaluation.loss import check_tokenizer
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.choice import group_limited_topk
from model.quantile import BINS, add_to_histogram, bias_lift, quantile_step
from model.router import Router, expert_scores, router_logits, tokens_per_expert

ROUNDS = 30  # towards the bias that evens given tokens, half of the way each
OWN_TOKENS = 1 << 16  # of the first steps, on which that is done (one step at least); the others only count
ROWS = 16  # of a forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder that launch/export.py wrote")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders that data/preprocess.py wrote; their training splits are used",
    )
    parser.add_argument("--sequence_length", type=int, default=256, metavar="N", help="tokens in a row")
    parser.add_argument(
        "--tokens_a_step", type=int, nargs="+", default=[4096, 16384, 65536], metavar="T", help="token counts of a step; whole rows"
    )
    parser.add_argument("--tokens", type=int, default=1 << 20, metavar="T", help="how many tokens to route in all")
    parser.add_argument(
        "--averages",
        type=float,
        nargs="+",
        default=[0.0, 0.5, 0.9],
        metavar="A",
        help="moving averages of the bias: the part that is kept",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the order of the rows")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`{tokens a step: {"steps", rule: {"layers", "worst"}}}`: medians over the steps of max_vio, by layer and of the worst one."""
    if arguments.sequence_length < 1:
        raise UserError(f"--sequence_length must be at least 1, got {arguments.sequence_length}")
    for average in arguments.averages:
        if not 0 <= average < 1:
            raise UserError(f"--averages must be at least 0 and below 1, the part of the old bias that is kept, got {average:g}")
    rows = arguments.tokens // arguments.sequence_length
    for tokens in arguments.tokens_a_step:
        if tokens % arguments.sequence_length or not 0 < 2 * tokens <= rows * arguments.sequence_length:
            raise UserError(
                f"--tokens_a_step {tokens} must be whole rows of {arguments.sequence_length}, and two steps at least of "
                f"--tokens {arguments.tokens}"
            )
    model, scores_YTE, bias_YE = observed(arguments, rows)
    choice = Choice(model.config)
    best_YE = torch.stack([choice.evening(scores, bias) for scores, bias in zip(scores_YTE[:, ::4], bias_YE, strict=True)])
    result = {
        str(tokens): compare(choice, scores_YTE, best_YE, tokens, arguments.averages) for tokens in sorted(arguments.tokens_a_step)
    }
    show(result)
    return result


def observed(arguments: argparse.Namespace, rows: int) -> tuple[MoEGPTForCausalLM, Tensor, Tensor]:
    """The model, its routers' scores `[Y, T, E]` on so many rows, and their biases `[Y, E]`."""
    from launch.exported.model import load_exported

    model, _ = load_exported(arguments.model, device="cpu")
    if not isinstance(model, MoEGPTForCausalLM):
        raise UserError(f"--model {arguments.model} is no moe_gpt folder: it has no correction bias of ours")
    data = PackedDataset(arguments.data, split="train", sequence_length=arguments.sequence_length, seed=arguments.seed)
    check_tokenizer((arguments.model / "tokenizer.json").read_bytes(), data)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    found: list[list[Tensor]] = [[] for _ in routers]
    for router, scores in zip(routers, found, strict=True):
        router.register_forward_pre_hook(keeping(scores, model.config.scoring_func))
    progress = Progress(rows, what="routing", unit="rows")
    with torch.no_grad():
        for first in range(0, rows, ROWS):
            model.model(data.batch(range(first, min(first + ROWS, rows)))["input_ids"])
            progress.update(min(first + ROWS, rows))
    progress.close()
    return model, torch.stack([torch.cat(parts) for parts in found]), torch.stack([r.e_score_correction_bias for r in routers])


def keeping(scores: list[Tensor], scoring_func: str) -> Callable[[Router, tuple[Any, ...]], None]:
    """A hook that appends a router's scores."""

    def hook(router: Router, given: tuple[Any, ...]) -> None:
        scores.append(expert_scores(router_logits(given[0], router.projection()), scoring_func))

    return hook


class Choice:
    """How a model's routers choose, and what evens that out."""

    def __init__(self, config: MoEGPTConfig) -> None:
        self.experts = config.n_routed_experts
        self.sizes = config.num_experts_per_tok, config.n_group, config.topk_group

    def max_vio(self, scores_TE: Tensor, bias_E: Tensor) -> float:
        load_E = tokens_per_expert(group_limited_topk(scores_TE + bias_E, *self.sizes), self.experts)
        return float(load_E.max() / load_E.double().mean() - 1)

    def next_bias(self, scores_TE: Tensor, bias_E: Tensor, average: float) -> Tensor:
        """As training would set it after these tokens."""
        top_k, n_group, topk_group = self.sizes
        histogram_EN = torch.zeros(self.experts, BINS, dtype=torch.int64)
        add_to_histogram(histogram_EN, bias_lift(scores_TE, bias_E, top_k=top_k, n_group=n_group, topk_group=topk_group), bias_E)
        return quantile_step(bias_E, histogram_EN, top_k / self.experts, average)

    def evening(self, scores_TE: Tensor, bias_E: Tensor) -> Tensor:
        """The bias under which these very tokens come out most evenly."""
        tried = [bias_E]
        for _ in range(ROUNDS):
            tried.append(self.next_bias(scores_TE, tried[-1], 0.5))
        return min(tried, key=lambda bias: self.max_vio(scores_TE, bias))


def compare(choice: Choice, scores_YTE: Tensor, best_YE: Tensor, tokens: int, averages: list[float]) -> dict[str, Any]:
    """Every rule over the same steps of so many tokens, each begun at the best constant bias."""
    count = scores_YTE.shape[1] // tokens
    drawn = torch.randperm(scores_YTE.shape[1], generator=torch.Generator().manual_seed(0)).split(tokens)[:count]
    found: dict[str, list[list[float]]] = {}
    for scores_TE, best_E in zip(scores_YTE, best_YE, strict=True):
        steps = scores_TE.split(tokens)[:count]
        found.setdefault("constant", []).append([choice.max_vio(step, best_E) for step in steps])
        found.setdefault("shuffled", []).append([choice.max_vio(scores_TE[rows], best_E) for rows in drawn])
        for average in averages:
            found.setdefault(f"average {average:g}", []).append(followed(choice, steps, best_E, average))
        own = [choice.max_vio(step, choice.evening(step, best_E)) for step in steps[: max(1, OWN_TOKENS // tokens)]]
        found.setdefault("own", []).append(own)
    return {"steps": count} | {name: medians(torch.tensor(of_layers)) for name, of_layers in found.items()}


def followed(choice: Choice, steps: tuple[Tensor, ...], bias_E: Tensor, average: float) -> list[float]:
    """max_vio of each step under the bias that the steps before it made."""
    seen = []
    for scores_TE in steps:
        seen.append(choice.max_vio(scores_TE, bias_E))
        bias_E = choice.next_bias(scores_TE, bias_E, average)
    return seen


def medians(vio_YS: Tensor) -> dict[str, Any]:
    """As `small_runs.measured` has them: over the steps, of each layer and of the worst one of each step."""
    return {"layers": vio_YS.quantile(0.5, dim=1).tolist(), "worst": float(vio_YS.amax(dim=0).quantile(0.5))}


def show(result: dict[str, Any]) -> None:
    from launch.benchmarks.measure import print_table

    rules = [name for name in next(iter(result.values())) if name != "steps"]
    rows = [[int(tokens), one["steps"], *(f"{one[rule]['worst']:.3f}" for rule in rules)] for tokens, one in result.items()]
    print_table("max_vio of the worst layer, median over the steps", ["tokens a step", "steps", *rules], rows)
