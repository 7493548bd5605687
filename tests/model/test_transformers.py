"""The model as transformers' users use it; each row of the table in model/README.md is a test here or in test_modeling.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoint_layers
from torch import Tensor, nn
from transformers import DynamicCache, Glm4MoeForCausalLM, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import MoEGPTConfig, MoEGPTForCausalLM, MoEGPTModel
from model.glm4_moe import to_glm4_moe
from model.head import LMHead
from tests import reference

IMPLEMENTATIONS = ["eager", "sdpa", "flash"]


def made(**overrides: object) -> MoEGPTForCausalLM:
    """Two layers with sinks, correction biases and norms that are not those of a new model."""
    fields = {"vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    model = MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **{**fields, "initializer_range": 0.3, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=2.0)
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    return model.eval()


def prompt(padded: bool = False) -> dict[str, Tensor]:
    ids, mask = torch.randint(0, 97, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def continued(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)


# ------------------------------------------------------------------ what a forward returns


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_hidden_states_are_the_residual_stream(attention: str) -> None:
    """Embedding, then each block's output, the last one after the final norm; gradients reach them."""
    model = made(attn_implementation=attention)
    inputs, seen = prompt(), []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model.model.layers]
    outputs = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    states = outputs.hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], model.model.embed_tokens(inputs["input_ids"]))
    assert torch.equal(states[1], seen[0]) and torch.equal(states[2], model.model.norm(seen[1]))
    states[1].retain_grad()
    outputs.logits.sum().backward()
    assert float(states[1].grad.abs().sum()) > 0
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    assert len(model.generate(**inputs, max_new_tokens=2, **asked).hidden_states) == 2


def test_attentions_are_the_probabilities() -> None:
    """By the formula from the layer's own q and k; a sink leaves a row's sum below 1."""
    model = made(attn_implementation="eager", num_hidden_layers=1, qk_norm=False).double()
    inputs = prompt()
    (weights,) = model(**inputs, output_attentions=True).attentions
    attention = model.model.layers[0].self_attn
    _, x = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"]))
    angles = torch.arange(11, dtype=torch.float64)[:, None] * torch.tensor(
        reference.yarn_frequencies(16, 10_000.0, 2.0, 512), dtype=torch.float64
    )
    concentration = 0.1 * torch.log(torch.tensor(2.0)).item() + 1
    q, k = (
        reference.rotate(project(x).view(2, 11, -1, 16), angles[None, :, None], concentration)
        for project in (attention.q_proj, attention.k_proj)
    )
    scores = torch.einsum("bsnd,blnd->bnsl", q, k.repeat_interleave(2, dim=2)) / 4
    scores = scores.masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), -torch.inf)
    sinks = attention.sinks[None, :, None, None].expand(2, 4, 11, 1)
    expected = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert (weights.sum(dim=-1) < 0.999).any()


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_attentions_whatever_the_implementation(attention: str) -> None:
    model, inputs = made(attn_implementation=attention), prompt(padded=True)
    plain = model(**inputs)
    outputs = model(**inputs, output_attentions=True)
    torch.testing.assert_close(outputs.logits[:, 4:], plain.logits[:, 4:], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(outputs.attentions, expected, strict=True)) and len(expected) == 2
    model.config.output_attentions = True  # for all forwards; a configuration takes it beside `eager` only
    model.set_attn_implementation(attention)
    assert all(torch.equal(a, b) for a, b in zip(model(**inputs).attentions, expected, strict=True))


def test_return_dict_false_is_the_tuple() -> None:
    model, inputs = made(), prompt()
    whole = model(**inputs, labels=inputs["input_ids"])
    loss, logits = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert isinstance(whole, CausalLMOutputWithPast) and torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert isinstance(model.model(**inputs, return_dict=False), tuple)
    model.config.return_dict = False
    assert torch.equal(model(**inputs, use_cache=False)[0], logits)


def test_logits_come_beside_the_loss_outside_training() -> None:
    model, inputs = made(), prompt()
    outputs = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(outputs.logits, model(**inputs).logits)
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-6)
    assert model(input_ids=inputs["input_ids"], shift_labels=inputs["input_ids"]).logits is None
    assert model.train()(**inputs, labels=inputs["input_ids"]).logits is None


def test_keywords_that_would_change_the_result_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = made(), prompt()
    wrong = {"output_router_logits": True, "is_causal": False, "cu_seq_lens_q": torch.tensor([0, 11, 22])}
    for keyword, value in wrong.items():
        with pytest.raises(ValueError, match=keyword):
            model(**inputs, **{keyword: value})
    with pytest.raises(ValueError, match="no paged attention for continuous batching"):  # what generate_batch's forwards pass
        model(**inputs, read_index=[torch.arange(11)], write_index=[torch.arange(11)])
    model(**inputs, output_router_logits=False, is_causal=True, cache_position=torch.arange(11))
    packed = {"position_ids": torch.cat((torch.arange(4), torch.arange(7))).expand(2, -1)}  # as a flattening collator gives them
    ours, theirs = model(**inputs, **packed), model(**inputs, **packed, cu_seq_lens_q=torch.tensor([0, 4, 11, 15, 22]))
    assert torch.equal(ours.logits, theirs.logits)


def test_a_misspelt_keyword_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from model import keywords

    said: list[str] = []
    monkeypatch.setattr(keywords.logger, "warning_once", said.append, raising=False)
    made()(**prompt(), attention_maks=torch.ones(2, 11))
    assert said == ["the model's forward ignores attention_maks"]


# ------------------------------------------------------------------ caches


def test_the_cache_follows_the_configuration_but_not_in_training() -> None:
    model, inputs = made(), prompt()
    assert isinstance(model(**inputs).past_key_values, DynamicCache)
    assert model(**inputs, use_cache=False).past_key_values is None
    for name in ("labels", "shift_labels"):  # a loss needs none
        assert model(**inputs, **{name: inputs["input_ids"]}).past_key_values is None
    model.config.use_cache = False
    assert model(**inputs).past_key_values is None and model(**inputs, use_cache=True).past_key_values is not None
    model.config.use_cache = True
    assert model.train()(**inputs).past_key_values is None


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_generates_the_same_tokens(attention: str, padded: bool, sinks: bool) -> None:
    model, inputs = made(attn_implementation=attention, attention_sinks=sinks), prompt(padded)
    expected = continued(model, inputs, use_cache=False)
    assert expected[:, 11:].unique().numel() > 3  # not one token over and over
    assert torch.equal(continued(model, inputs), expected)
    assert torch.equal(continued(model, inputs, cache_implementation="static"), expected)


def test_a_static_cache_gives_the_same_logits() -> None:
    """Its free slots are not positions: one query after another, and a chunk of queries."""
    model, ids = made(), prompt()["input_ids"]
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 9), (9, 11))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_given_counts_without_use_cache() -> None:
    """As where a loss of a continuation is asked for."""
    model, ids = made(), prompt()["input_ids"]
    filled = model(ids[:, :4]).past_key_values
    found = model(ids[:, 4:], labels=ids[:, 4:], past_key_values=filled)
    expected = model(ids, labels=torch.where(torch.arange(11) > 4, ids, -100))
    torch.testing.assert_close(found.logits, expected.logits[:, 4:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_a_cache_by_its_newer_name() -> None:
    """transformers 5.24 gives `cache` where 5.23 gave `past_key_values`."""
    model, inputs = made(), prompt(False)
    filled = model(**inputs, use_cache=True)
    new = torch.tensor([[3], [5]])
    expected = model(torch.cat((inputs["input_ids"], new), dim=1), use_cache=False).logits[:, -1]
    found = model(new, cache=filled.past_key_values).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    empty = DynamicCache()  # whose length, and so its truth, is that of its layers
    assert model(**inputs, cache=empty).past_key_values is empty and empty.get_seq_length() == 11
    with pytest.raises(ValueError, match="give one of cache and past_key_values"):
        model(new, past_key_values=filled.past_key_values, cache=filled.past_key_values)


def test_a_cache_that_forgets_is_refused() -> None:
    class Forgetful(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(*args, **kwargs)
            return keys[:, :, -8:], values[:, :, -8:]

    with pytest.raises(ValueError, match="keeps 8 of 11 positions"):
        made()(**prompt(), past_key_values=Forgetful())


def test_a_cache_goes_on_where_it_stopped() -> None:
    """A second call of generate on the cache of the first equals one call."""
    model, inputs = made(), prompt()
    whole = continued(model, inputs)
    first = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    seen = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}  # a 0 that it wrote is no padding
    again = model.generate(**seen, past_key_values=first.past_key_values, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("padded", [False, True])
def test_beams_do_not_depend_on_the_cache(padded: bool) -> None:
    model, inputs = made(), prompt(padded)
    beams = continued(model, inputs, num_beams=3)
    assert torch.equal(beams, continued(model, inputs, num_beams=3, use_cache=False))
    assert torch.equal(beams, continued(model, inputs, num_beams=3, cache_implementation="static"))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_assisted_generation_gives_the_models_own_tokens(attention: str) -> None:
    model, draft = made(attn_implementation=attention), made(num_hidden_layers=1)
    one = {name: value[:1] for name, value in prompt().items()}
    greedy = continued(model, one)
    assert torch.equal(continued(model, one, assistant_model=draft), greedy)
    assert torch.equal(continued(model, one, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(continued(model, one, assistant_early_exit=1), greedy)  # its own first layer as the draft


def test_a_model_of_fewer_layers_by_its_configuration() -> None:
    """What an early exit asks for while it drafts: the first layers, as a model has them that has no others."""
    model, short, inputs = made(num_hidden_layers=3), made(num_hidden_layers=1), prompt()
    short.load_state_dict(model.state_dict(), strict=False)
    whole = model(**inputs).logits
    model.config.num_hidden_layers = 1
    torch.testing.assert_close(model(**inputs).logits, short(**inputs).logits)
    assert not torch.allclose(model(**inputs).logits, whole)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_query_on_padding_sees_what_transformers_lets_it(attention: str) -> None:
    """Padding on the right is answered from the last place, which is padding: the text before it, and not itself."""
    model = made(attn_implementation=attention, attention_sinks=False)
    theirs = Glm4MoeForCausalLM(to_glm4_moe(model.config)).eval()
    theirs.load_state_dict(model.state_dict())
    inputs = prompt()
    inputs["attention_mask"][0, 7:] = 0
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(continued(model, inputs), continued(theirs, inputs))


def test_generation_from_embeddings() -> None:
    model, inputs = made(), prompt()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=12, pad_token_id=0)
    assert torch.equal(out, continued(model, inputs)[:, 11:])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_generate_the_same_tokens(cache: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("transformers' offloading needs a CUDA device")
    model, inputs = made().cuda(), {name: value.cuda() for name, value in prompt().items()}
    assert torch.equal(continued(model, inputs, cache_implementation=cache), continued(model, inputs))


# ------------------------------------------------------------------ masks and attention implementations


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_mask_of_four_dimensions(attention: str) -> None:
    """Bool, or what transformers adds to the scores: the same as the padding that it stands for."""
    model, inputs = made(attn_implementation=attention), prompt(padded=True)
    allowed = torch.ones(11, 11, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    expected = model(**inputs).logits[:, 4:]
    for mask in (allowed, added):
        logits = model(inputs["input_ids"], attention_mask=mask).logits[:, 4:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_switched_and_other_names_lead_to_flash() -> None:
    model, inputs = made(attn_implementation="eager"), prompt()
    expected = model(**inputs).logits
    for name, runs in (("flash_attention_2", "flash"), ("sdpa", "sdpa"), ("flash", "flash")):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == runs
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be one of flash, sdpa, eager"):
        model.set_attn_implementation("flex_attention")


def test_rope_of_another_kind_set_afterwards_is_refused() -> None:
    config = made().config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"rope_type must be one of default, yarn, got 'dynamic'"):
        MoEGPTModel(config)


# ------------------------------------------------------------------ activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model, ids = made().train(), prompt()["input_ids"]
    gradients = []
    for on in (False, True):
        model.zero_grad()
        if on:
            checkpoint_layers(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
            assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, True]
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    checkpoint_layers(model, False)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_checkpointing_drops_an_empty_cache_and_refuses_a_filled_one() -> None:
    model, ids = made(), prompt()["input_ids"]
    filled = model(ids[:, :4]).past_key_values
    checkpoint_layers(model.train())
    outputs = model(ids, labels=ids, use_cache=True)
    outputs.loss.backward()
    assert outputs.past_key_values is None
    with pytest.raises(ValueError, match="past_key_values with tokens"):
        model(ids[:, 4:], past_key_values=filled)
    with pytest.raises(ValueError, match="has 14 columns for 11 keys, and no cache has the others"):
        model(ids, attention_mask=torch.ones(2, 14), past_key_values=DynamicCache(config=model.config))
    evaluated = model.eval()(ids[:, 4:], past_key_values=filled)  # where nothing is recomputed, the cache counts
    torch.testing.assert_close(evaluated.logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_generating_between_checkpointed_steps() -> None:
    """In training mode without gradients nothing is recomputed: the cache stays, and with it what came before."""
    model, inputs = made(), prompt()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    checkpoint_layers(model.train())
    assert torch.equal(model.generate(**inputs, **options), expected)
    with torch.no_grad():
        assert int(model(**inputs, use_cache=True).past_key_values.get_seq_length()) == inputs["input_ids"].shape[1]
    assert model(**inputs, use_cache=True).past_key_values is None


def test_a_mask_of_more_tokens_than_there_are_is_refused() -> None:
    """What `generate` would hand over whose cache was lost on the way."""
    model, inputs = made(), prompt()
    with pytest.raises(ValueError, match="attention_mask has 11 columns for 1 keys, and no cache has the others"):
        model(inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"])


# ------------------------------------------------------------------ vocabulary and head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [90, 110])
def test_resizing_the_vocabulary(tied: bool, tokens: int, tmp_path: Path) -> None:
    """Old rows stay, the loss stays fused and right, and it is saved in its new size."""
    model, kept = made(tie_word_embeddings=tied), min(tokens, 97)
    before = model.lm_head.weight[:kept].clone()
    model.resize_token_embeddings(tokens)
    assert isinstance(model.lm_head, LMHead) and model.config.vocab_size == tokens
    assert torch.equal(model.lm_head.weight[:kept], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    weights = model.lm_head.weight.clone()
    model.post_init()  # as a wrapper around the model would call it
    assert torch.equal(model.lm_head.weight, weights)
    ids = torch.randint(0, kept, (2, 11))
    outputs = model(ids, labels=ids)
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert outputs.logits.shape[-1] == tokens
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    read = MoEGPTForCausalLM.from_pretrained(tmp_path)
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    # Where a weight lies in memory decides how some BLAS libraries round.
    torch.testing.assert_close(read(ids).logits, outputs.logits, rtol=1e-5, atol=1e-5)


def test_another_output_embedding() -> None:
    model, ids = made(), prompt()["input_ids"]
    linear = nn.Linear(64, 50, bias=False)
    model.set_output_embeddings(linear)
    assert model.get_output_embeddings().weight is linear.weight
    torch.testing.assert_close(model(ids).logits, linear(model.model(ids).last_hidden_state))
    model.train()(ids % 50, labels=ids % 50).loss.backward()
    assert linear.weight.grad is not None
    with pytest.raises(ValueError, match="has no bias"):
        model.set_output_embeddings(nn.Linear(64, 50))


def test_a_wrapped_head_has_the_same_loss() -> None:
    """Whatever stands around the head and knows logits only, as an adapter does; z-loss and padding included."""

    class Wrapped(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model, ids = made(z_loss_weight=0.01).train(), prompt()["input_ids"]
    labels = ids.clone()
    labels[0, :5] = -100
    expected = [model(ids, labels=labels, num_items_in_batch=n).loss for n in (None, 40)]
    model.lm_head = Wrapped(model.lm_head)
    for loss, n in zip(expected, (None, 40), strict=True):
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=n).loss, loss, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_torch_export_gives_the_same_logits(attention: str) -> None:
    """For a fixed shape and without a cache; what depends on the values of a mask cannot be exported."""
    model, ids = made(attn_implementation=attention).bfloat16(), prompt()["input_ids"]
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        assert torch.equal(program.module()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_torch_export_in_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="in bfloat16 only"):
        torch.export.export(made(), (prompt()["input_ids"],), {"use_cache": False}, strict=False)


# ------------------------------------------------------------------ Trainer, accelerate, peft


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 97, (12, 16), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.parametrize("label_names", [None, ["labels"]])
def test_trainer_trains_and_evaluates(label_names: list[str] | None, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        label_names=label_names,
        gradient_checkpointing=True,
    )
    shapes: list[tuple[int, ...]] = []

    def accuracy(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    model, rows = made(), Rows()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)
    trainer.train()
    measured = trainer.evaluate()
    model.eval()
    expected = float(model(rows.ids, labels=rows.ids).loss.detach())
    assert measured["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert shapes and set(shapes) == {(12, 16, 97)} and "eval_accuracy" in measured
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] is not None


@pytest.mark.parametrize("places", ["cpu", "disk"])
def test_device_map(places: str, tmp_path: Path) -> None:
    """accelerate's placement: everything on one device, or a block's weights on the disk until it runs."""
    pytest.importorskip("accelerate")
    model, inputs = made(), prompt(padded=True)
    model.save_pretrained(tmp_path / "hf")
    device_map: dict[str, str] = {"": "cpu"}
    if places == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.norm": "cpu", "model.rotary": "cpu", "lm_head": "cpu"}
    read = MoEGPTForCausalLM.from_pretrained(tmp_path / "hf", device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(read(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(continued(read, inputs), continued(model, inputs))


def test_lora_on_attention_and_experts(tmp_path: Path) -> None:
    """Adapters begin as the model, learn, leave the base alone, survive saving, and merge to the same logits."""
    peft = pytest.importorskip("peft")
    model, ids = made(), prompt()["input_ids"]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(ids).logits
    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(adapted(ids).logits, plain, rtol=1e-5, atol=1e-5)
    adapted.train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained) and any("lm_head" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    adapted.eval()
    learned = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    fresh = made()
    fresh.load_state_dict(base)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh, tmp_path)(ids).logits, learned, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, learned, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(base)


def test_without_sinks_a_stock_folder_and_ours_are_read_alike(tmp_path: Path) -> None:
    """transformers' own class reads the weights that this one saves."""
    model, ids = made(attention_sinks=False), prompt()["input_ids"]
    from transformers import Glm4MoeConfig

    c = model.config
    names = (
        "vocab_size",
        "hidden_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    names += ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings")
    stock = Glm4MoeConfig(
        **{name: getattr(c, name) for name in names},
        head_dim=c.head_dim,
        first_k_dense_replace=0,
        use_qk_norm=True,
        rope_parameters={**(c.rope_parameters or {}), "partial_rotary_factor": 1.0},
    )
    model.save_pretrained(tmp_path)
    theirs = Glm4MoeForCausalLM.from_pretrained(tmp_path, config=stock).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
