"""Runs inside vLLM's own environment: python in_vllm.py FOLDER PROMPTS.json ANSWERS.json NEW_TOKENS [trust].

Greedy tokens and prompt log-probabilities of token ids, by vLLM on a CPU.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    folder, prompts, answers, new_tokens, *trust = sys.argv[1:]
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        trust_remote_code=bool(trust),
        max_logprobs=2048,
    )
    names = llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__name__}")
    greedy = SamplingParams(max_tokens=int(new_tokens), temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    with open(prompts, encoding="utf-8") as file:
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(file)]
    found = [
        {
            "tokens": list(out.outputs[0].token_ids),
            "logprobs": [next(iter(one.values())).logprob for one in out.prompt_logprobs if one],
        }
        for out in llm.generate(asked, greedy)
    ]
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"class": names[0], "answers": found}, file)


if __name__ == "__main__":
    main()
