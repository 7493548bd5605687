"""transformers' loop of one token after the other, without what it prepares anew for each; for `generate(custom_generate=...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from launch.generation.decode_step import DecodeStep, can_step
from launch.generation.onednn import FasterProducts
from launch.generation.stop import Stream
from model.cache import GrowingCache


def fast(model: PreTrainedModel, stream: Stream | None = None) -> dict[str, Any]:
    """Keywords for `generate`: a cache that is not copied for each token and, on a CPU, this loop. On a GPU theirs asks for the
    stop later than it happens, so that the device does not wait."""
    # transformers 5.23 forgets `streamer` where a function is given: it goes by another name.
    loop = {"custom_generate": decode, "stream": stream} if model.device.type == "cpu" else {"streamer": stream}
    return {"past_key_values": GrowingCache(), **loop}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    stream: Stream | None = None,
    **given: Any,
) -> Tensor:
    """`[B, S + N]`: the prompts `[B, S]` and the tokens after them, drawn or the likeliest; a row that has ended is padded.

    Of what else `generate` gives, the cache counts, and the `attention_mask`, which is None where nothing is padded.
    """
    attention_mask: Tensor | None = given.get("attention_mask")
    settings: Any = generation_config  # its prepared tensors have no types
    pad, drawn = settings._pad_token_tensor, settings.do_sample
    unfinished_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new_BS, positions_BS = input_ids, None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
    cache, step = given["cache" if "cache" in given else "past_key_values"], None  # its name since transformers 5.24, and before
    if stream is not None:
        stream.put(input_ids.cpu())
    while True:
        if step is None:
            with FasterProducts():
                out = model(
                    new_BS,
                    attention_mask=attention_mask,
                    position_ids=positions_BS,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    return_dict=True,  # whatever the folder's configuration says
                )
            logits_BV = out.logits[:, -1]
            step = DecodeStep(model) if isinstance(cache, GrowingCache) and can_step(model) else None
        else:
            logits_BV = step(new_BS[:, 0], cache, attention_mask, positions_BS)
        scores_BV = logits_processor(input_ids, logits_BV.float())  # type: ignore[arg-type]
        next_B = scores_BV.softmax(dim=-1).multinomial(1)[:, 0] if drawn else scores_BV.argmax(dim=-1)
        if pad is not None:
            next_B = torch.where(unfinished_B, next_B, pad)
        new_BS = next_B[:, None]
        input_ids = torch.cat((input_ids, new_BS), dim=1)
        if attention_mask is not None and positions_BS is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(input_ids), 1)), dim=1)
            positions_BS = positions_BS[:, -1:] + 1
        if stream is not None:
            stream.put(next_B.cpu())
        unfinished_B &= ~stopping_criteria(input_ids, scores_BV)
        if not bool(unfinished_B.any()):
            break
    if stream is not None:
        stream.end()
    return input_ids
