"""`ModelSizes` against `MoEGPTConfig`, which it stands in for."""

from __future__ import annotations

import subprocess
import sys

from model import MoEGPTConfig
from model.accounting import count_parameters
from model.sizes import ModelSizes


def test_what_is_derived_is_the_configurations_own() -> None:
    """The experts' width where it is not given, and a dense model: every expert is chosen."""
    given = {"intermediate_size": 96, "n_routed_experts": 2, "num_experts_per_tok": 2}
    sizes, config = ModelSizes.of(given), MoEGPTConfig(**given, n_group=1, topk_group=1)
    assert sizes.moe_intermediate_size == config.moe_intermediate_size == 96
    assert count_parameters(sizes) == count_parameters(config) and sizes.usual_context == 2048
    assert ModelSizes(max_position_embeddings=512).usual_context == 512


def test_parameters_are_those_of_the_model() -> None:
    """Counted on the modules, with the fields that change the count turned."""
    import torch

    from model import MoEGPTForCausalLM

    fields_ = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    for changed in ({}, {"tie_word_embeddings": True}, {"qk_norm": False, "attention_sinks": False}, {"head_dim": 16}):
        given = {**fields_, "moe_intermediate_size": 24, "n_shared_experts": 2, **changed}
        with torch.device("meta"):
            model = MoEGPTForCausalLM(MoEGPTConfig(**given))
        assert count_parameters(ModelSizes.of(given)).total == sum(p.numel() for p in model.parameters())


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, model.config_json, model.accounting; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
