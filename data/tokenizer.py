"""Tokenizers: found, trained, fingerprinted and saved. `tokenizer.json` as the tokenizers library reads it is the truth.

transformers' AutoTokenizer is bypassed on purpose: where `tokenizer_config.json` names GPT2Tokenizer (StarCoder2's does),
transformers 5 rebuilds the tokenizer without its digit splitting and gives other ids. What we save names PreTrainedTokenizerFast.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

END_OF_TEXT = "<|endoftext|>"
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
#: Looked for in this order where `tokenizer_config.json` does not name the end of text.
END_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What shards and training need to know. `vocab_size` is the largest id + 1, added tokens included."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_token: str
    eos_token_id: int
    fim: dict[str, int] | None  # prefix, middle, suffix


def tokenizer_json(name: str) -> tuple[str, dict[str, Any]]:
    """(text of `tokenizer.json`, `tokenizer_config.json` or {}) of a file, a folder or a hub name.

    Raises FileNotFoundError with a way to get one.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8"), _config(path.with_name("tokenizer_config.json"))
    if name.startswith((".", "/", "~")) or path.suffix == ".json" or Path(name).exists() or name.count("/") > 1:
        raise FileNotFoundError(f"no tokenizer at {path}; give a tokenizer.json, its folder, a hub name, or --train_tokenizer 4096")
    return _from_hub(name)


def _config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _from_hub(name: str) -> tuple[str, dict[str, Any]]:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.logging import set_verbosity_error

        set_verbosity_error()  # it warns at each of its attempts; the last failure is told below
        text = Path(hf_hub_download(name, "tokenizer.json")).read_text(encoding="utf-8")
    except Exception as error:  # every way a network, a proxy, a login or a name can fail
        raise FileNotFoundError(
            f"tokenizer {name} is not on this machine and could not be fetched from the hub ({type(error).__name__}): download its "
            "tokenizer.json elsewhere and pass that file to --tokenizer, or train one here with --train_tokenizer 4096"
        ) from error
    try:
        return text, _config(Path(hf_hub_download(name, "tokenizer_config.json")))
    except Exception:  # a tokenizer without a configuration is complete
        return text, {}


def facts(name: str, text: str, config: dict[str, Any]) -> TokenizerFacts:
    """Check `tokenizer.json` and read what we need of it. Raises ValueError for what cannot be a tokenizer of ours."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{name} is not a tokenizer.json that the tokenizers library reads: {error}") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    configured = config.get("eos_token")
    configured = configured.get("content") if isinstance(configured, dict) else configured
    eos = next((t for t in (configured, *END_CANDIDATES) if t in vocabulary), None)
    if eos is None:
        raise ValueError(f"tokenizer {name} has no end-of-text token: none of {', '.join(END_CANDIDATES)} is in its vocabulary")
    fim = {t.split("_")[1].rstrip(">"): vocabulary.get(t) for t in FIM_TOKENS[:3]}
    return TokenizerFacts(
        name=name,
        fingerprint=fingerprint(text),
        vocab_size=max(vocabulary.values()) + 1,
        eos_token=eos,
        eos_token_id=vocabulary[eos],
        fim=None if None in fim.values() else {k: v for k, v in fim.items() if v is not None},
    )


def fingerprint(text: str) -> str:
    """sha256 of what decides the ids: white space, key order and the two spellings of merges make no difference."""
    content = orjson.loads(text)
    content = {k: content.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    model = content["model"]
    if isinstance(model, dict) and "merges" in model:
        content["model"] = model | {"merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def save(folder: Path, text: str, known: TokenizerFacts) -> None:
    """Write `tokenizer.json` as it is and a `tokenizer_config.json` that transformers loads with the right ids."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": known.eos_token,
        "bos_token": known.eos_token,
        "unk_token": known.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    for name, content in (("tokenizer.json", text), ("tokenizer_config.json", json.dumps(config, indent=2) + "\n")):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / name)


def train(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE tokenizer with single digits, as `tokenizer.json` text. Ids 0 to 4: end of text and the FIM tokens.

    The same texts give the same tokenizer. Raises ValueError for a vocabulary smaller than bytes and special tokens (261).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [END_OF_TEXT, *FIM_TOKENS]
    if vocab_size < 256 + len(special):
        raise ValueError(f"--train_tokenizer must be at least {256 + len(special)} (bytes and special tokens), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str(pretty=True)
