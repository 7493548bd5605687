"""Presets, aliases, refusals, and the counts that README and DESIGN state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MoEGPTConfig, MoEGPTForCausalLM
from model.accounting import count_parameters, forward_flops_per_token, training_flops_per_token

# What the README says: total and active parameters, as written there.
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
    assert counter.get_total_flops() == training_flops_per_token(config, 96, causal=False) * 192


def test_flops_of_the_default_preset() -> None:
    """2.833 GFLOP a token in training at 2,048, as worked out by hand for the throughput goals."""
    assert training_flops_per_token(MoEGPTConfig.preset("800m"), 2048) == pytest.approx(2.833e9, rel=1e-3)


def test_aliases_of_the_first_description() -> None:
    config = MoEGPTConfig(hidden_dim=128, num_attn_heads=4, num_key_value_heads=2, num_experts=4, context_length=512)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (128, 4, 32)
    assert (config.n_routed_experts, config.max_position_embeddings) == (4, 512)
    assert config.hidden_dim == 128 and config.num_local_experts == 4
    assert config.rope_parameters["original_max_position_embeddings"] == 512
    assert MoEGPTConfig.preset("tiny", num_experts=4, n_group=2, topk_group=1).n_routed_experts == 4


def test_it_survives_json(tmp_path: Path) -> None:
    config = MoEGPTConfig.preset("tiny", qk_norm=True, z_loss_weight=1e-4, eos_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = MoEGPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moe_gpt"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"n_group": 3}, "must divide n_routed_experts"),
        ({"n_group": 8, "topk_group": 4}, "groups of 2 or more"),
        ({"topk_group": 5}, "must not exceed n_group"),
        ({"num_experts_per_tok": 5}, "must not exceed the 4 experts in the 2 chosen of 4 groups"),
        ({"scoring_func": "relu"}, "scoring_func must be one of sigmoid, softmax, got 'relu'"),
        ({"expert_dropout": 1.0}, "expert_dropout must be at least 0 and below 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type must be one of default, yarn"),
        ({"rope_parameters": {"factor": 0.5}}, "factor must be at least 1"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"hiden_size": 5}, "unknown model configuration field 'hiden_size'"),
    ],
)
def test_wrong_values_are_named(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoEGPTConfig.preset("tiny", **fields)


def test_unknown_preset_names_the_presets() -> None:
    with pytest.raises(ValueError, match="unknown preset '3b'; the presets are tiny, 60m, 800m, 4b"):
        MoEGPTConfig.preset("3b")


def test_rope_factor() -> None:
    config = MoEGPTConfig.preset("800m")
    longer = config.with_rope_factor(4)
    assert longer.max_position_embeddings == 8192 and config.max_position_embeddings == 2048
    assert longer.rope_parameters["factor"] == 4.0
    assert longer.rope_parameters["original_max_position_embeddings"] == 2048
    assert longer.with_rope_factor(4).to_dict() == longer.to_dict()
    assert longer.with_rope_factor(1).rope_parameters == config.rope_parameters
    assert MoEGPTConfig.preset("tiny").with_rope_factor(4).max_position_embeddings == 2048
    with pytest.raises(ValueError, match="at least 1"):
        config.with_rope_factor(0.5)


def test_importing_touches_nothing() -> None:
    """Every module imports in a fresh interpreter without opening a socket or initialising CUDA."""
    code = (
        "import importlib, pkgutil, socket, torch, transformers\n"
        "def refuse(*args): raise AssertionError('a module opens a connection')\n"
        "socket.socket.connect = refuse\n"
        "import model\n"
        "names = [m.name for m in pkgutil.iter_modules(model.__path__, 'model.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "assert len(names) > 8 and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
