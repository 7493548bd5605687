"""The folders that other software is given: exports of models that are hard to get right by luck.

12 experts in 4 groups, a router bias that changes choices, sinks far from 0, norms that are not 1, YaRN at factor 4.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launch.exporting import folder as exported_folder
from launch.exporting.formats import CODE, build, exported_config
from model import MoEGPTConfig, MoEGPTForCausalLM

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "moe_gpt": {"format": "moe_gpt"},
    "moe_gpt-softmax": {"format": "moe_gpt", "scoring_func": "softmax"},
    "moe_gpt-no-sinks": {"format": "moe_gpt", "attention_sinks": False},
    "glm4_moe": {"format": "glm4_moe", "attention_sinks": False},
    "glm4_moe-head_dim": {"format": "glm4_moe", "attention_sinks": False, "head_dim": 32, "qk_norm": False},
}


def hard_model(vocabulary: int, **fields: Any) -> MoEGPTForCausalLM:
    torch.manual_seed(0)
    rope = {"factor": 4.0, "original_max_position_embeddings": 128}
    config = MoEGPTConfig.preset(
        "tiny",
        vocab_size=vocabulary,
        n_routed_experts=12,
        max_position_embeddings=512,
        rope_parameters=rope,
        attn_implementation="eager",
        eos_token_id=0,
        **fields,
    )
    model = MoEGPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=2.0)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.05)
    return model


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of this repository's own code."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(path) for path in sorted((ROOT / "model").glob("*.py"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def write_export(folder: Path, kind: str, vocabulary: int = 512) -> MoEGPTForCausalLM:
    """One export in fp32, and the training model that it must agree with."""
    fields = dict(KINDS[kind])
    format = fields.pop("format")
    model = hard_model(vocabulary, **fields)
    exported = build(exported_config(model.config, format), model.state_dict().items(), "float32")
    exported_folder.set_generation(exported)
    shutil.rmtree(folder, ignore_errors=True)
    exported.save_pretrained(folder)
    if format == "moe_gpt":
        for name in CODE:
            shutil.copyfile(exported_folder.HUB / name, folder / name)
    tokenizer(vocabulary).save_pretrained(folder)
    return model


def expected(model: MoEGPTForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """By the training model: greedy tokens, and the log-probability of each prompt token and of each new one."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            logprobs = model(ids).logits[0].double().log_softmax(dim=-1)
        scores = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        new = out[0, len(prompt) :]
        with torch.no_grad():
            made = model(out).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1).gather(1, new[:, None])[:, 0]
        answers.append({"tokens": new.tolist(), "logprobs": scores.tolist(), "new_logprobs": made.tolist()})
    return answers


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, vocabulary, (count, length), generator=generator).tolist()


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], scores: str = "logprobs") -> tuple[int, int, float]:
    """(equal greedy tokens, greedy tokens, largest difference of a log-probability); `scores`: of which tokens of ours."""
    tokens = [a == b for one, two in zip(theirs, ours, strict=True) for a, b in zip(one["tokens"], two["tokens"], strict=True)]
    pairs = [pair for one, two in zip(theirs, ours, strict=True) for pair in zip(one["logprobs"], two[scores], strict=True)]
    return sum(tokens), len(tokens), float(torch.tensor(pairs).diff().abs().max())


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
