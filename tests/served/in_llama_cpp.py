"""Runs inside llama.cpp's own environment: python in_llama_cpp.py FILE.gguf PROMPTS.json ANSWERS.json NEW_TOKENS.

Greedy tokens of token ids, and the log-probability of each, by llama.cpp (the wheel `xllamacpp`) on a CPU.
"""

import json
import sys

import xllamacpp


def main() -> None:
    path, prompts, answers, new_tokens = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    found = []
    with open(prompts, encoding="utf-8") as file:
        asked = json.load(file)
    for ids in asked:
        wanted = {"prompt": ids, "max_tokens": int(new_tokens), "temperature": 0.0, "logprobs": 1}
        said = server.handle_completions({**wanted, "cache_prompt": False, "ignore_eos": True})
        said = json.loads(said) if isinstance(said, str) else said
        made = said["choices"][0]["logprobs"]["content"][: int(new_tokens)]
        found.append({"tokens": [one["id"] for one in made], "logprobs": [one["logprob"] for one in made]})
    with open(answers, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
