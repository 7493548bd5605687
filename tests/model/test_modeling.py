"""The whole model: against transformers' Glm4Moe, against finite differences, generation, saving, initial weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from model import MoEGPTConfig, MoEGPTForCausalLM


def small(**overrides: object) -> MoEGPTConfig:
    fields = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 40, "num_hidden_layers": 3}
    return MoEGPTConfig.preset("tiny", **{**fields, **overrides})


def glm4_of(c: MoEGPTConfig) -> Glm4MoeForCausalLM:
    names = ["vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim"]
    names += ["num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group"]
    names += ["topk_group", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings"]
    fields = {name: getattr(c, name) for name in names}
    theirs = Glm4MoeConfig(
        **fields,
        first_k_dense_replace=0,
        use_qk_norm=c.qk_norm,
        rope_parameters={**c.rope_parameters, "partial_rotary_factor": 1.0},
        attn_implementation="eager",
    )
    return Glm4MoeForCausalLM(theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("groups", "chosen", "scale"), [(2, 1, 1.0), (4, 2, 2.5), (1, 1, 1.0)])
def test_without_sinks_it_is_glm4_moe(attention: str, qk_norm: bool, groups: int, chosen: int, scale: float) -> None:
    """Logits and every gradient, with correction biases of both signs that do change the routing."""
    c = small(
        attention_sinks=False,
        qk_norm=qk_norm,
        n_group=groups,
        topk_group=chosen,
        routed_scaling_factor=scale,
        attn_implementation=attention,
        rms_norm_eps=0.05,  # which every norm takes from here: one of its own would be seen
    )
    ours, theirs = MoEGPTForCausalLM(c), glm4_of(c)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(std=0.6 if name.endswith("gate.weight") else 0.08)
            if "norm" in name:
                parameter.add_(1)
        for layer in ours.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.9, 0.3, 8)[torch.randperm(8)])
    missing = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not missing.missing_keys
    ids = torch.randint(0, 97, (2, 50))
    logits = ours(ids).logits
    expected = theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-5)
    dlogits = torch.randn_like(logits)
    logits.backward(dlogits)
    expected.backward(dlogits)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=2e-3, atol=2e-4, msg=name)
        assert float(parameter.grad.abs().sum()) > 0, name
    # Not vacuous: without the biases other experts are chosen.
    for layer in ours.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert (ours(ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
def test_gradient_of_the_whole_model_by_finite_differences(attention: str) -> None:
    """float64, sinks, qk norm, z-loss and packed documents on; along one random direction per parameter."""
    c = small(qk_norm=True, z_loss_weight=0.01, attn_implementation=attention, vocab_size=40)
    model = MoEGPTForCausalLM(c).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids, targets = torch.randint(0, 40, (2, 24)), torch.randint(0, 40, (2, 24))
    targets[0, :3] = -100
    positions = torch.cat((torch.arange(9), torch.arange(15))).expand(2, -1)

    def loss() -> torch.Tensor:
        return model(ids, shift_labels=targets, position_ids=positions, num_items_in_batch=30).loss

    loss().backward()
    epsilon = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        with torch.no_grad():
            parameter.add_(direction, alpha=epsilon)
            above = loss()
            parameter.sub_(direction, alpha=2 * epsilon)
            below = loss()
            parameter.add_(direction, alpha=epsilon)
        numeric, exact = float(above - below) / (2 * epsilon), float((parameter.grad * direction).sum())
        assert exact == pytest.approx(numeric, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
def test_cached_generation_equals_uncached(attention: str) -> None:
    model = MoEGPTForCausalLM(small(attn_implementation=attention, initializer_range=0.2)).eval()
    ids = torch.randint(0, 97, (3, 11))
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    uncached = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    assert len(set(cached[:, 11:].flatten().tolist())) > 5  # not one token over and over
    with torch.no_grad():
        outputs = model(cached[:, :-1], use_cache=True)
        step = model(cached[:, -1:], past_key_values=outputs.past_key_values, use_cache=True)
        whole = model(cached)
    torch.testing.assert_close(step.logits[:, 0], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
def test_padded_batch_generates_what_single_prompts_do(attention: str) -> None:
    model = MoEGPTForCausalLM(small(attn_implementation=attention, initializer_range=0.2)).eval()
    long, short = torch.randint(1, 97, (1, 9)), torch.randint(1, 97, (1, 4))
    batch = torch.cat((long, torch.nn.functional.pad(short, (5, 0))))
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **settings)
    for row, prompt in enumerate((long, short)):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(together[row, 9:], alone[0, prompt.shape[1] :])


def test_loss_forms_agree() -> None:
    model = MoEGPTForCausalLM(small()).eval()
    ids = torch.randint(0, 97, (2, 30))
    with_labels = model(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    output = model(ids, shift_labels=shifted)
    assert torch.equal(with_labels, output.loss) and output.logits is None
    logits = model(ids).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(with_labels, plain, rtol=1e-6, atol=0)
    summed = model(ids, shift_labels=shifted, num_items_in_batch=10).loss
    torch.testing.assert_close(summed, plain * 58 / 10, rtol=1e-6, atol=0)
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 97)
    for keep in (3, torch.tensor([27, 28, 29])):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits[:, 27:], rtol=1e-5, atol=1e-6)


def test_documents_are_isolated_through_all_layers() -> None:
    """Logits of document 2 stay while document 1 changes; without positions they do differ.

    To the bit where every expert takes every token. With sparse experts document 1 decides how many rows an expert's product
    has, and a BLAS library may round a row otherwise in a product of another height.
    """
    every_expert = {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    check_isolation(small(initializer_range=0.2, **every_expert), rtol=0, atol=0)
    check_isolation(small(initializer_range=0.2), rtol=1e-5, atol=1e-5)


def check_isolation(config: MoEGPTConfig, rtol: float, atol: float) -> None:
    model = MoEGPTForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, 60))
    other = torch.cat((torch.randint(0, 97, (1, 25)), ids[:, 25:]), dim=1)
    positions = torch.cat((torch.arange(25), torch.arange(35)))[None]
    with torch.no_grad():
        first, second = model(ids, position_ids=positions).logits, model(other, position_ids=positions).logits
        alone = model(ids[:, 25:]).logits
        unmasked = model(ids).logits, model(other).logits
    torch.testing.assert_close(first[:, 25:], second[:, 25:], rtol=rtol, atol=atol)
    assert (first[:, :25] - second[:, :25]).abs().max() > 0.1
    torch.testing.assert_close(first[:, 25:], alone, rtol=1e-5, atol=1e-5)  # positions restart
    assert (unmasked[0][:, 25:] - unmasked[1][:, 25:]).abs().max() > 0.1


def test_a_cache_of_packed_documents_is_not_gone_on_with() -> None:
    """The next token looked at all of them. The cache that is emptied may hold anything again."""
    model, ids = MoEGPTForCausalLM(small()).eval(), torch.randint(0, 97, (1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        cache = model(ids, position_ids=positions, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values holds packed documents"):
            model(ids[:, :1], position_ids=torch.tensor([[3]]), past_key_values=cache)
        cache.reset()
        for chunk in (ids[:, :3], ids[:, 3:4]):
            logits = model(chunk, past_key_values=cache).logits
        torch.testing.assert_close(logits[:, -1], model(ids[:, :4]).logits[:, -1], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="position_ids restart after 4 cached positions"):
            model(ids[:, :3], position_ids=positions[:, :3], past_key_values=cache)


def test_z_loss_is_for_training_only() -> None:
    model = MoEGPTForCausalLM(small(z_loss_weight=0.5))
    ids = torch.randint(0, 97, (1, 20))
    training = model(ids, labels=ids).loss
    evaluated = model.eval()(ids, labels=ids).loss
    log_sum = model(ids).logits[:, :-1].logsumexp(-1)
    torch.testing.assert_close(training - evaluated, 0.5 * log_sum.square().mean(), rtol=1e-4, atol=1e-5)


def test_initial_weights() -> None:
    """The configuration's standard deviations, and the loss that an untrained model should have."""
    c = MoEGPTConfig.preset("tiny")
    model = MoEGPTForCausalLM(c)
    residual = 0.02 / (2 * c.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = 0.02
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            expected = residual
        elif name.endswith("gate.weight"):
            expected = c.router_initializer_range
        elif "embed_tokens" in name:
            expected = 0.2
        if "sinks" in name:  # four numbers have no standard deviation to speak of: below
            continue
        assert float(parameter.std()) == pytest.approx(expected, rel=0.06), name
        assert abs(float(parameter.mean())) < expected, name
    for name, buffer in model.named_buffers():
        assert not buffer.any(), name
    ids = torch.randint(0, 4096, (2, 100))
    assert float(model(ids, labels=ids).loss) == pytest.approx(8.318, abs=0.15)  # ln 4096
    wide = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", router_initializer_range=0.0625))
    assert float(wide.model.layers[0].mlp.gate.weight.std()) == pytest.approx(0.0625, rel=0.06)
    headed = MoEGPTForCausalLM(small(num_attention_heads=512, num_key_value_heads=1, head_dim=2))
    sinks = torch.cat([layer.self_attn.sinks for layer in headed.model.layers])
    assert float(sinks.std()) == pytest.approx(0.02, rel=0.06) and abs(float(sinks.mean())) < 0.002
    tied = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", tie_word_embeddings=True))
    assert float(tied.lm_head.weight.std()) == pytest.approx(0.02, rel=0.06)
    assert float(tied(ids, labels=ids).loss) == pytest.approx(8.318, abs=0.5)


def test_counters_begin_at_zero() -> None:
    """Where a model is made on `meta` and read from a folder, its buffers are what their memory held before."""
    model = MoEGPTForCausalLM(small(router_balance="quantile"))
    gate = model.model.layers[0].mlp.gate
    for buffer in gate.buffers():
        buffer.fill_(3)
    gate._is_hf_initialized = False
    model._init_weights(gate)
    assert [bool(buffer.any()) for buffer in gate.buffers()] == [False] * 4


def test_saving_and_loading(tmp_path: Path) -> None:
    model = MoEGPTForCausalLM(small(qk_norm=True)).eval()
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(8) * 1e-3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 30))
    for attention in ("eager", "sdpa", "flash"):
        loaded = MoEGPTForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.config._attn_implementation == attention
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    half = MoEGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    for ours, theirs in zip(model.model.layers, half.model.layers, strict=True):
        assert torch.equal(ours.mlp.gate.e_score_correction_bias, theirs.mlp.gate.e_score_correction_bias)
    with pytest.raises(ValueError, match='"flash_attention_9"` is not supported; it must be one of flash, sdpa, eager'):
        MoEGPTForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_9")


def test_tied_embeddings(tmp_path: Path) -> None:
    model = MoEGPTForCausalLM(small(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = MoEGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name == "model" or name.startswith("model.") for name in sys.modules)
folder, attention = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
saved = torch.load(folder + "/expected.pt")
torch.testing.assert_close(model(saved["ids"]).logits, saved["logits"], rtol=1e-4, atol=1e-5)
tokens = model.generate(saved["ids"][:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
assert tokens.shape == (2, 9)
import importlib.machinery, types  # on a GPU host there is a triton, and in this copy no kernel that needs it
sys.modules["triton"] = types.ModuleType("triton")
sys.modules["triton"].__spec__ = importlib.machinery.ModuleSpec("triton", None)
operators = sys.modules[type(model).__module__.rpartition(".")[0] + ".operators"]
operators.has_triton.cache_clear()
assert not operators.has_triton()
print("same", model.config._attn_implementation)
"""


def test_exported_with_its_own_code_it_loads_elsewhere(tmp_path: Path) -> None:
    """A fresh interpreter, outside the repository, that has never heard of this package."""
    folder = tmp_path / "exported"
    model = MoEGPTForCausalLM(small()).eval()
    MoEGPTConfig.register_for_auto_class()
    MoEGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(folder)
    finally:
        MoEGPTConfig._auto_class = MoEGPTForCausalLM._auto_class = None
    ids = torch.randint(0, 97, (2, 20))
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "expected.pt")
    for attention in ("flash", "eager"):
        environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-I", "-c", ELSEWHERE, str(folder), attention],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        assert f"same {attention}" in result.stdout


def test_bad_input_is_one_sentence() -> None:
    model = MoEGPTForCausalLM(small())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))
