"""Our loop makes the tokens that transformers' own makes, drawn ones and padded batches too, and stops where it stops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Glm4MoeForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from launch.exporting.formats import exported_config
from launch.generation.decode import decode, fast
from launch.generation.decode_step import DecodeStep
from launch.generation.sampler import left_padded
from model import MoEGPTConfig, MoEGPTForCausalLM

PROMPTS = [[11, 12, 13], [40, 41, 42, 43, 44, 45, 46], [7]]
FIELDS: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}


def of_ours() -> PreTrainedModel:
    torch.manual_seed(3)
    return MoEGPTForCausalLM(MoEGPTConfig.preset("tiny", **FIELDS, attn_implementation="sdpa")).eval()


def of_transformers() -> PreTrainedModel:
    torch.manual_seed(4)
    return Glm4MoeForCausalLM(exported_config(MoEGPTConfig.preset("tiny", **FIELDS, attention_sinks=False), "glm4_moe")).eval()


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.values += value.flatten().tolist()

    def end(self) -> None:
        self.values.append(-1)


class AfterFour(StoppingCriteria):
    """Ends the second row after four new tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[1:2] = input_ids.shape[1] >= 7 + 4
        return done


def test_what_is_drawn_from_is_float32() -> None:
    """In bf16 two logits of 20 and 20.05 are one number: transformers has its processors work on float32 as well."""
    seen: list[torch.dtype] = []

    def model(ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(len(ids), 1, 9, dtype=torch.bfloat16))

    def processor(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.dtype)
        return scores

    settings: Any = SimpleNamespace(_pad_token_tensor=None, do_sample=True)
    ended: Any = lambda ids, _: torch.tensor([ids.shape[1] >= 5])  # noqa: E731
    found = decode(model, torch.tensor([[1, 2]]), processor, ended, settings, past_key_values=None)  # type: ignore[arg-type]
    assert found.shape == (1, 5) and seen == [torch.float32] * 3


@pytest.mark.parametrize("make", [of_ours, of_transformers])
@pytest.mark.parametrize(
    "more", [{"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 20}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["padded", "alone"])
def test_tokens_are_those_of_transformers(
    make: Any, more: dict[str, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make()
    stepped: list[DecodeStep] = []
    monkeypatch.setattr("launch.generation.decode.DecodeStep", lambda model: (stepped.append(DecodeStep(model)), stepped[-1])[1])
    ids, mask = left_padded(prompts, 7, pad=0)
    rows, streams = [], []
    for ours in (False, True):
        torch.manual_seed(5)
        stream = Collected() if len(prompts) == 1 else None
        keywords = fast(model, stream) if ours else {"streamer": stream}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=16,
            eos_token_id=[5, 9],
            pad_token_id=0,
            repetition_penalty=1.1,
            stopping_criteria=StoppingCriteriaList([AfterFour()]),
            **more,
            **keywords,
        )
        rows.append(out.tolist())
        streams.append(stream and stream.values)
    assert keywords["custom_generate"] is decode
    assert len(stepped) == (make is of_ours)
    assert rows[0] == rows[1] and streams[0] == streams[1]
    if len(prompts) == 3:
        assert len(set(map(tuple, rows[0]))) == 3 and not any(rows[0][1][11:])  # the second was stopped, and padded
