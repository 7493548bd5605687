"""Parameters and FLOPs by formula, against `numel`, PyTorch's counter and what README states."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.accounting import count_parameters, forward_flops_per_token, training_flops_per_token

STATED = {"60m": ("56.9 M", "54.5 M"), "800m": ("812 M", "472 M"), "4b": ("4.38 B", "1.66 B")}


def written(count: int) -> str:
    value, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{value:.3g} {unit}"


@pytest.mark.parametrize("preset", ["tiny", "60m", "800m", "4b"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "attention_sinks": False, "tie_word_embeddings": True}])
def test_formula_equals_numel(preset: str, options: dict) -> None:
    config = MoEGPTConfig.preset(preset, **options)
    with torch.device("meta"):
        model = MoEGPTForCausalLM(config)
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and "shared" not in name)
    assert count.routed_experts == routed
    unused = 1 - config.num_experts_per_tok / config.n_routed_experts
    assert count.active == count.total - routed * unused


@pytest.mark.parametrize("preset", STATED)
def test_counts_are_those_of_the_readme(preset: str) -> None:
    count = count_parameters(MoEGPTConfig.preset(preset))
    assert (written(count.total), written(count.active)) == STATED[preset]
    readme = Path(__file__).resolve().parents[2] / "README.md"
    if "812 M" not in readme.read_text(encoding="utf-8"):
        pytest.skip("README.md has no table of presets yet")
    for number in STATED[preset]:
        assert number in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("experts", [(8, 2, 1), (4, 1, 2)])
def test_flops_formula_equals_pytorchs_counter(experts: tuple[int, int, int]) -> None:
    """The counter sees every matrix product of the eager model; it counts all S x S scores, so `causal=False`."""
    routed, top_k, shared = experts
    config = MoEGPTConfig.preset(
        "tiny",
        n_routed_experts=routed,
        num_experts_per_tok=top_k,
        n_shared_experts=shared,
        n_group=1,
        topk_group=1,
        attn_implementation="eager",
    )
    model = MoEGPTForCausalLM(config).double()  # experts one by one: the counter does not know grouped products
    ids = torch.randint(0, 4096, (2, 96))
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == forward_flops_per_token(config, 96, causal=False) * 192
    with FlopCounterMode(display=False) as counter:
        logits = model(ids).logits
        logits.backward(torch.ones_like(logits))
    assert counter.get_total_flops() == 3 * forward_flops_per_token(config, 96, causal=False) * 192


def test_flops_of_the_default_preset() -> None:
    """2.833 GFLOP a token in training at 2,048, as worked out by hand for the throughput goals."""
    assert training_flops_per_token(MoEGPTConfig.preset("800m"), 2048) == pytest.approx(2.833e9, rel=1e-3)
