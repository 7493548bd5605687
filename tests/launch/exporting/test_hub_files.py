"""The two files that a moe_gpt folder carries: small, by transformers' rules, and the same function as the training model."""

import ast
import inspect
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from launch.exporting.formats import AUTO_MAP, CODE, build, exported_config
from launch.exporting.hub import configuration_moe_gpt, modeling_moe_gpt
from launch.exporting.hub.modeling_moe_gpt import MoEGPTAttention
from model import MoEGPTConfig, MoEGPTForCausalLM

HUB = Path(configuration_moe_gpt.__file__).parent


def trained(**overrides: Any) -> MoEGPTForCausalLM:
    fields = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 12}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**fields, "initializer_range": 0.2, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=2.0)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def exported(model: MoEGPTForCausalLM, dtype: str = "float32") -> Any:
    return build(exported_config(model.config, "moe_gpt"), model.state_dict().items(), dtype)


CASES = [
    {},
    {"scoring_func": "softmax"},
    {"attention_sinks": False},
    {"n_group": 1, "topk_group": 1, "n_routed_experts": 1, "num_experts_per_tok": 1},  # a dense model
    {"qk_norm": False, "head_dim": 32},
    {"tie_word_embeddings": True, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_experts_per_tok": 3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_the_training_models(case: dict[str, Any]) -> None:
    """Prompt, left padding, and one token after another from a cache."""
    torch.manual_seed(0)
    model = trained(**case)
    hub, ids = exported(model), torch.randint(0, 97, (2, 40))
    expected = model(ids).logits
    torch.testing.assert_close(hub(ids).logits, expected, rtol=1e-4, atol=1e-4)
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[0, :9] = 0
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=padding, position_ids=positions).logits[:, 9:]
    theirs = hub(ids, attention_mask=padding, position_ids=positions).logits[:, 9:]
    torch.testing.assert_close(theirs, padded, rtol=1e-4, atol=1e-4)
    cache = DynamicCache()
    parts = [hub(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected[:, :12], rtol=1e-4, atol=1e-4)


def test_sinks_and_bias_matter_here() -> None:
    torch.manual_seed(0)
    model = trained()
    hub, ids = exported(model), torch.randint(0, 97, (2, 40))
    expected = hub(ids).logits
    with torch.no_grad():
        hub.model.layers[0].self_attn.sinks.fill_(-100.0)
    assert (hub(ids).logits - expected).abs().max() > 0.01
    hub = exported(model)
    hub.model.layers[0].mlp.gate.e_score_correction_bias.zero_()
    assert (hub(ids).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_the_training_models_tokens(cache: str) -> None:
    torch.manual_seed(0)
    model, ids = trained(), torch.randint(1, 97, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    options = {"attention_mask": padding, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(exported(model).generate(ids, **options, cache_implementation=cache), expected)


@pytest.mark.parametrize("sinks", [True, False])
def test_continuous_batching_makes_the_tokens_of_generate(sinks: bool) -> None:
    """Its pages come under the name of the ordinary cache, and a failure in them is an empty answer, not an exception."""
    torch.manual_seed(0)
    hub = exported(trained(attention_sinks=sinks))
    prompts = [torch.randint(1, 97, (length,)).tolist() for length in (5, 20, 33)]
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else most of the machine's memory is taken
    found = hub.generate_batch(prompts, greedy, continuous_batching_config=pages, progress_bar=False)
    for prompt, answer in zip(prompts, found.values(), strict=True):
        assert answer.generated_tokens == hub.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :].tolist()


def gradients(hub: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    hub.zero_grad()
    hub(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in hub.named_parameters()}


@pytest.mark.parametrize("sinks", [True, False])
def test_experts_are_one_grouped_product_unless_told_otherwise(sinks: bool) -> None:
    """As for transformers' own Glm4Moe; the same logits and gradients as expert after expert, with experts that are empty."""
    torch.manual_seed(0)
    hub = exported(trained(attention_sinks=sinks, n_group=1, topk_group=1))
    hub.model.layers[0].mlp.gate.e_score_correction_bias[3] = -10.0
    assert hub.config._experts_implementation == "grouped_mm"
    ids = torch.randint(0, 97, (2, 40))
    grouped, of_grouped = hub(ids).logits, gradients(hub, ids)
    hub.set_experts_implementation("eager")
    assert hub.config._experts_implementation == "eager"
    torch.testing.assert_close(grouped, hub(ids).logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(hub, ids).items():
        torch.testing.assert_close(of_grouped[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
    assert not of_grouped["model.layers.0.mlp.experts.down_proj"][3].any() and of_grouped["lm_head.weight"].any()


def test_the_padding_tokens_row_is_trained_as_any_other() -> None:
    """The folder names a padding token; transformers' embedding would then give its row no gradient."""
    torch.manual_seed(0)
    config = exported_config(trained().config, "moe_gpt")
    config.pad_token_id = 4
    hub = modeling_moe_gpt.MoEGPTForCausalLM(config)
    assert gradients(hub, torch.full((1, 8), 4))["model.embed_tokens.weight"][4].any()


def test_the_bias_stays_fp32_in_a_bf16_folder(tmp_path: Path) -> None:
    hub = exported(trained(), "bfloat16")
    hub.save_pretrained(tmp_path)
    read = modeling_moe_gpt.MoEGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gate = read.model.layers[0].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32 and gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, hub.model.layers[0].mlp.gate.e_score_correction_bias)


def test_in_bf16_only_other_experts_make_other_logits() -> None:
    """Two orders of rounding put a few tokens near a tie to other experts, whose logits are then others. With the training model's
    choices in its routers the exported class is within bf16's rounding at every token."""
    torch.manual_seed(0)
    model = trained(initializer_range=0.05)
    hub = exported(model, "bfloat16")
    model.to(torch.bfloat16)
    ids, chosen, theirs = torch.randint(0, 97, (8, 400)), list[torch.Tensor](), list[torch.Tensor]()
    for ours, layer in zip(model.model.layers, hub.model.layers, strict=True):
        ours.mlp.gate.register_forward_hook(lambda gate, given, made: chosen.append(made[1]))
        layer.mlp.gate.register_forward_hook(lambda gate, given, made: theirs.append(made[2]))
    with torch.no_grad():
        expected, free = model(ids).logits.float(), hub(ids).logits.float()
        others = [(one.sort()[0] != two.sort()[0]).any(dim=-1) for one, two in zip(chosen, theirs, strict=True)]
        assert 0 < sum(other.sum() for other in others) < 160, "of 6,400 choices"

        def as_chosen(gate: Any, given: Any, made: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            indices = chosen.pop(0)
            weights = made[0].sigmoid().gather(1, indices)
            return made[0], weights / weights.sum(dim=-1, keepdim=True), indices

        for layer in hub.model.layers:
            layer.mlp.gate.register_forward_hook(as_chosen)
        forced = hub(ids).logits.float()
    rounding = 4 * 2**-8 * expected.abs().max()
    assert (forced - expected).abs().max() < rounding < (free - expected).abs().max()


def test_attention_without_sinks_is_refused_rather_than_used() -> None:
    """transformers' sdpa and flash-attn 2 would drop them without a word."""
    assert exported(trained()).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        exported(trained()).set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "chosen",
    ["sdpa", "paged|sdpa", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "me/mine@v1:forward"],
)
def test_attention_without_sinks_set_past_the_check_is_refused_too(chosen: str) -> None:
    """By the private attribute, as notebooks do, and by a kernel of the hub's, for which transformers asks no class: the answer was
    that of the model without its sinks. A model without sinks loses nothing by it."""
    for sinks in (True, False):
        hub, ids = exported(trained(attention_sinks=sinks)), torch.randint(0, 97, (1, 8))
        hub.config._attn_implementation = chosen
        if sinks:
            with pytest.raises(ValueError, match=re.escape(f"{chosen} would drop this model's attention sinks; use eager")):
                hub(ids)
        elif chosen == "sdpa":
            hub(ids)


@pytest.mark.parametrize("chosen", ["eager", "flex_attention", "vllm", *modeling_moe_gpt.FLASH_WITH_SINKS])
def test_attention_that_takes_sinks_is_let_through(chosen: str) -> None:
    assert not modeling_moe_gpt.drops_sinks(chosen) and not modeling_moe_gpt.drops_sinks(f"paged|{chosen}")


def test_the_code_is_small_and_imports_nothing_of_this_repository() -> None:
    lines = 0
    for name in CODE:
        source = (HUB / name).read_text(encoding="utf-8")
        lines += len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = ["." * node.level + (node.module or "")]
            assert all(m.split(".")[0] in ("typing", "collections", "torch", "transformers", "") for m in modules), modules
            assert not isinstance(node, ast.ImportFrom) or node.level < 2
    assert lines < 220


def test_vllm_can_read_the_attention() -> None:
    """What vLLM's backend looks for in the source: one interface from ALL_ATTENTION_FUNCTIONS, called once, `s_aux=self.sinks`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(MoEGPTAttention.forward)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    interfaces = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr == "get_interface"]
    (used,) = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "attention_interface"]
    keywords = {k.arg: ast.unparse(k.value) for k in used.keywords}
    assert len(interfaces) == 1 and keywords["s_aux"] == "self.sinks" and keywords["scaling"] == "self.scaling"


def test_what_our_class_saves_of_an_export_names_no_code(tmp_path: Path) -> None:
    """Beside the export's code files it was read by them, without the norms of q and k; elsewhere not at all."""
    exported_config(MoEGPTConfig.preset("tiny"), "moe_gpt").save_pretrained(tmp_path / "hf")
    read = MoEGPTConfig.from_pretrained(tmp_path / "hf")
    read.save_pretrained(tmp_path / "own")
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert "auto_map" not in written and written["model_type"] == "moe_gpt"
    assert MoEGPTConfig.from_pretrained(tmp_path / "own").qk_norm and read.to_dict()["auto_map"] == AUTO_MAP


def test_configurations_agree_both_ways(tmp_path: Path) -> None:
    """The folder's config.json read by the training configuration is the one that it was made from."""
    config = MoEGPTConfig.preset("tiny", scoring_func="softmax", router_bias_rate=0.02, expert_dropout=0.1)
    hub = exported_config(config, "moe_gpt")
    hub.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    read = MoEGPTConfig.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        if name not in ("rope_parameters", "_name_or_path", "dtype", "architectures"):
            assert getattr(read, name) == value, name
    assert {**read.rope_parameters, "partial_rotary_factor": None} == {**config.rope_parameters, "partial_rotary_factor": None}
    assert hub.base_model_tp_plan["layers.*.self_attn.sinks"] == "colwise"


def test_every_tensor_parallel_rule_names_a_module() -> None:
    """A plan that matches nothing shards nothing, silently."""
    names = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in exported(trained()).model.named_modules()}
    names |= {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in exported(trained()).model.named_parameters()}
    unused = {"layers.*.mlp.gate_proj", "layers.*.mlp.up_proj", "layers.*.mlp.down_proj"}  # Glm4Moe's dense layers
    plan = set(exported_config(trained().config, "moe_gpt").base_model_tp_plan)
    assert plan - names <= unused


@pytest.mark.skipif("local_params" not in ALL_PARALLEL_STYLES, reason="transformers knows this style of a plan from 5.23 on")
def test_tensor_parallel_ranks_have_the_gradients_of_one(nursery: Nursery, tmp_path: Path) -> None:
    """Under Glm4Moe's plan each rank kept its own heads' share of the gradients of q's and k's norms, half of it off."""
    torch.manual_seed(0)
    hub, ids = exported(trained()), torch.randint(0, 97, (2, 24))
    hub.save_pretrained(tmp_path / "hf")
    for name in CODE:
        shutil.copy(HUB / name, tmp_path / "hf" / name)
    torch.save(ids, tmp_path / "hf" / "ids.pt")
    worker, output = "tests/launch/exporting/tensor_parallel_worker.py", tmp_path / "out.pt"
    ranks = nursery.start(2, worker, tmp_path / "hf", output, log=tmp_path / "log")
    assert ranks.wait(120) == [0, 0], ranks.text()[-3000:]
    found = torch.load(output)
    out = hub(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(found["logits"], out.logits.detach(), rtol=1e-4, atol=1e-4)
    for name, parameter in hub.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("sinks", [True, False])
def test_attention_dropout_is_applied_in_training_alone(sinks: bool) -> None:
    """Glm4Moe's field, for who fine-tunes an export; with sinks it was dropped without a word."""
    torch.manual_seed(0)
    hub, ids = exported(trained(attention_sinks=sinks)), torch.randint(0, 97, (2, 24))
    plain = hub(ids).logits
    for layer in hub.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(hub.eval()(ids).logits, plain)
    assert not torch.allclose(hub.train()(ids).logits, hub(ids).logits, atol=1e-3)
