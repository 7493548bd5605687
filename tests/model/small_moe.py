"""A small mixture of experts in float64, with a router that is biased and weights that are not tiny."""

import torch

from model.config import MoEGPTConfig
from model.moe import MoE


def config(**overrides: object) -> MoEGPTConfig:
    small = {"hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MoEGPTConfig.preset("tiny", **{**small, **overrides})


def initialised(c: MoEGPTConfig) -> MoE:
    moe = MoE(c).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.gate.e_score_correction_bias.copy_(torch.randn(c.n_routed_experts) * 0.3)
    return moe
