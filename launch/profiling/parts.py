"""The parts of a training step, and which module's time belongs to which. The roofline's table and the profile's share them."""

from __future__ import annotations

from torch import nn

#: In the order of the profile's table.
PARTS = (
    *("data", "embedding", "norms", "attention", "router", "dispatch", "experts", "shared expert", "combine", "compiled block"),
    *("loss", "gradients", "optimizer", "communication", "other", "idle"),
)
#: By the end of a module's name, after `model.layers.N.`; the innermost counts.
IN_A_BLOCK = {
    "self_attn": "attention",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "mlp.router": "router",
    "mlp.gate": "router",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared expert",
    "mlp.shared_experts.gate_proj": "shared expert",
    "mlp.shared_experts.up_proj": "shared expert",
    "mlp.shared_experts.down_proj": "shared expert",
}
OUTSIDE = {"model.embed_tokens": "embedding", "model.norm": "norms", "lm_head": "loss"}


def parts_of(model: nn.Module, rest_of_mixture: str | None = None) -> dict[nn.Module, str]:
    """What the operations of each module count as; `rest_of_mixture` is a MoE layer without its own modules."""
    in_a_block = IN_A_BLOCK if rest_of_mixture is None else {**IN_A_BLOCK, "mlp": rest_of_mixture}
    found = {}
    for name, module in model.named_modules():
        part = OUTSIDE.get(name) or in_a_block.get(".".join(name.split(".")[3:]))
        if part is not None:
            found[module] = part
    return found
