"""What is trained for parity: model, data and settings, and the reference in plain PyTorch, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.balance import LoadBalancer

GLOBAL_BATCH, LENGTH, VOCABULARY, EXPERTS = 16, 24, 97, 8
STEPS, LEARNING_RATE, BIAS_RATE = 3, 0.5, 0.01
CLIP = 0.25  # below every step's norm
ROUTINGS = ("uneven", "one expert", "empty experts", "by quantiles")


def config(routing: str) -> MoEGPTConfig:
    """Two of eight experts within two of four groups; for `one expert` a top-1 router, not normalised (else it has no gradient).

    `by quantiles` is `uneven` under the other rule of balancing.
    """
    choice: dict[str, Any] = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
    if routing == "by quantiles":
        choice["router_balance"] = "quantile"
    if routing == "one expert":
        choice = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}
    return MoEGPTConfig.preset(
        "tiny", vocab_size=VOCABULARY, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, n_routed_experts=EXPERTS, max_position_embeddings=64, rope_parameters=None, **choice
    )  # fmt: skip


def build(routing: str) -> MoEGPTForCausalLM:
    """The same weights at every call; larger than at a real start, so that every part has a gradient that counts."""
    torch.manual_seed(3)
    settings = config(routing)
    settings._attn_implementation = "sdpa"
    model = MoEGPTForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets `[GLOBAL_BATCH, LENGTH]` of step `number`."""
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(100 + number))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def bias(routing: str) -> Tensor:
    """`uneven`: of both signs. `one expert`: every token to expert 5. `empty experts`: none to the experts 0, 1, 6 and 7."""
    if routing == "one expert":
        return torch.tensor([0.0, 0, 0, 0, 0, 9, 0, 0])
    if routing == "empty experts":
        return torch.tensor([-9.0, -9, 0, 0.1, 0, 0, -9, -9])
    return torch.tensor([0.3, -0.2, 0.05, -0.4, 0.1, 0.0, 0.2, -0.05])


def set_bias(layers: Iterable[Any], routing: str) -> None:
    for layer in layers:
        router = layer.router if hasattr(layer, "router") else layer.gate
        router.e_score_correction_bias.copy_(bias(routing))


def counted_lifts(routers: Iterable[Any]) -> list[int]:
    """Tokens times experts that each router has counted for its quantiles in this step."""
    return [0 if router.lift_EN is None else int(router.lift_EN.sum()) for router in routers]


def train_plainly(routing: str, clip: bool) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The whole global batch at once in one process with torch's own SGD and clipping: weights, and rows by step."""
    model = build(routing).train()
    set_bias([layer.mlp for layer in model.model.layers], routing)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    balancer = LoadBalancer(model, BIAS_RATE, rule=model.config.router_balance)
    rows: dict[str, list[Any]] = {"loss": [], "norm": [], "imbalance": [], "lifts": []}
    for number in range(STEPS):
        inputs, targets = batch(number)
        loss = model(input_ids=inputs, shift_labels=targets).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP if clip else torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        rows["lifts"].append(counted_lifts(layer.mlp.gate for layer in model.model.layers))
        rows["loss"].append(loss.item())
        rows["norm"].append(norm.item())
        rows["imbalance"].append(balancer.step()["load_max_over_mean"])
    rows["bias"] = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers]
    return {name: p.detach() for name, p in model.named_parameters()}, rows
