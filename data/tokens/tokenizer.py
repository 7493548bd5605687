"""Tokenizers: checked, trained, fingerprinted and saved. `tokenizer.json` as the tokenizers library reads it is the truth.

transformers' AutoTokenizer is bypassed on purpose: where `tokenizer_config.json` names GPT2Tokenizer (StarCoder2's does),
transformers 5 rebuilds the tokenizer without its digit splitting and gives other ids. What we save names PreTrainedTokenizerFast.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data.cli import UserError, sentence
from data.files import replace_file, replace_json
from data.tokens.encoder import ReferenceEncoder, naming_what_has_no_id
from data.tokens.folder import CONFIG, TOKENIZER, TokenizerFiles

END_OF_TEXT = "<|endoftext|>"
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
#: Looked for in this order where no file names the end of text.
END_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
#: The largest id of the int32 that shards are written in.
MAX_ID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What shards and training need to know. `vocab_size` is the largest id + 1, added tokens included."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_token: str
    eos_token_id: int
    fim: dict[str, int] | None  # prefix, middle, suffix


def facts(name: str, files: TokenizerFiles, tokenizer: Any = None) -> TokenizerFacts:
    """Check `tokenizer.json` and read what we need of it. Raises UserError for what cannot be a tokenizer of ours.

    `tokenizer`: the library's, where it is at hand: to make one of a large vocabulary takes 0.1 s.
    """
    tokenizer = tokenizer or library_tokenizer(name, files.text)
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise UserError(
            f"tokenizer {name} draws merges by chance (model.dropout is {dropout:g}), so that a text has other ids each time; "
            "set it to null: shards hold one way to write a text"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"tokenizer {name} has an empty vocabulary")
    largest = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[largest] > MAX_ID:
        raise UserError(f"tokenizer {name} gives {largest!r} the id {vocabulary[largest]:,}; shards hold ids up to {MAX_ID:,}")
    eos = _end_token(name, files, vocabulary)
    fim = {t.split("_")[1].rstrip(">"): vocabulary.get(t) for t in FIM_TOKENS[:3]}
    return TokenizerFacts(
        name=name,
        fingerprint=fingerprint(files.text),
        vocab_size=vocabulary[largest] + 1,
        eos_token=eos,
        eos_token_id=vocabulary[eos],
        fim=None if None in fim.values() else {k: v for k, v in fim.items() if v is not None},
    )


def library_tokenizer(name: str, text: str) -> Any:
    """The tokenizers library's own, for whole texts: a file may cut and pad them. Raises UserError for what it does not read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic of its own that is not even one
        reason = sentence(error)[:200]
        raise UserError(f"{name} is not a tokenizer.json that the tokenizers library reads: {reason}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _end_token(name: str, files: TokenizerFiles, vocabulary: Mapping[str, int]) -> str:
    if files.end_token is not None:
        if files.end_token not in vocabulary:
            raise UserError(
                f"{files.named_by} names {files.end_token!r} as the token that ends documents, which tokenizer.json does not have; "
                "correct the name, or save the folder anew with transformers so that both agree"
            )
        return files.end_token
    found = next((token for token in END_CANDIDATES if token in vocabulary), None)
    if found is None:
        raise UserError(
            f"tokenizer {name} has no end-of-text token: none of {', '.join(END_CANDIDATES)} is in its vocabulary; "
            f"name one as eos_token in {CONFIG} beside it"
        )
    return found


#: What code has: capitals, spaces in a row, tabs and line ends, numbers, accents, scripts, pictures.
SAMPLES = ("Stack", "a  b", "x\n\ty\n", "1200", "é", "中", "\U0001f600", "{}[]~`", "    return x\n")


def lossy_example(tokenizer: Any) -> tuple[str, str] | None:
    """(a sample, what the library's tokenizer makes of it) where it does not come back as it was; None for one that keeps text."""
    byte_level = tokenizer.decoder is None and "ByteLevel" in str(tokenizer.pre_tokenizer)
    for sample in SAMPLES:
        encoding = tokenizer.encode(sample, add_special_tokens=False)
        back = tokenizer.decode(encoding.ids, skip_special_tokens=False)
        unknown = getattr(tokenizer.model, "unk_token", None)
        if (back != sample and not byte_level) or (unknown is not None and unknown in encoding.tokens):
            return sample, back
    return None


def check_reach(name: str, text: str, ours: Mapping[str, int]) -> None:
    """Raises UserError where a document that spells one of the tokens `ours`, which are put between texts, would get its id, or
    where one of SAMPLES gets none."""
    tokenizer = ReferenceEncoder(text, tuple(ours.values())).tokenizer
    for token, number in ours.items():
        for spelled in (token, f"{token} ({token})\n{token}\n x{token}x {''.join(SAMPLES)}"):
            with naming_what_has_no_id(f"tokenizer {name}"):
                encoding = tokenizer.encode(spelled, add_special_tokens=False)  # a batch starts threads: nothing may fork then
            if number not in encoding.ids:
                continue
            raise UserError(
                f"tokenizer {name} can give text the id {number} of {token!r}, which may only stand between texts; it must be a "
                "token of its own, neither a word that the model makes nor its unknown token; take another, with another --output"
            )


#: Cut at each place for `check_cuts`.
CUT_SAMPLE = "return  left\n"


def check_cuts(name: str, tokenizer: Any) -> None:
    """Raises UserError where the parts of a text, encoded one by one, are another text: Llama 2's tokenizer, and BERT's, would have
    a space at each cut."""
    whole = _read_back(tokenizer, CUT_SAMPLE)
    for at in range(1, len(CUT_SAMPLE)):
        parts = CUT_SAMPLE[:at], CUT_SAMPLE[at:]
        if (back := _read_back(tokenizer, *parts)) != whole:
            raise UserError(
                f"--fim_rate cuts documents, and tokenizer {name} does not keep a text that is cut: {parts[0]!r} and {parts[1]!r} "
                f"come back as {back!r}; leave --fim_rate out, or take a tokenizer that puts nothing before a text, and another "
                "--output"
            )


def _read_back(tokenizer: Any, *parts: str) -> str:
    """What `parts` are, encoded one by one; in the tokenizer's own symbols where it has no decoder."""
    found = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    if tokenizer.decoder is None:
        return "".join(symbol for encoding in found for symbol in encoding.tokens)
    return str(tokenizer.decode([i for encoding in found for i in encoding.ids], skip_special_tokens=False))


def fingerprint(text: str) -> str:
    """sha256 of what decides the ids: white space, key order and the two spellings of merges make no difference."""
    content = orjson.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    content = {k: content.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    model = content["model"]
    if isinstance(model, dict) and "merges" in model:
        content["model"] = model | {"merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def as_trained(text: str, tokenizer: Any) -> str:
    """A `tokenizer.json` that adds no token of its own to a text, as none was added to what is trained on (Llama's begins each text
    with one): itself where it adds none. `tokenizer`: the library's of it."""
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        return text
    return json.dumps(json.loads(text) | {"post_processor": None})


def for_batches(tokenizer: Any, end_token: str) -> dict[str, str]:
    """Of a `tokenizer_config.json`: prompts are padded before their first token, with another than the end of text where there is
    one, since whoever trains further masks it."""
    pad = FIM_TOKENS[3] if tokenizer.token_to_id(FIM_TOKENS[3]) is not None else end_token
    return {"pad_token": pad, "padding_side": "left"}


def save(folder: Path, text: str, known: TokenizerFacts) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json` with which transformers makes the ids that are trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = library_tokenizer(known.name, text)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": known.eos_token,
        "bos_token": known.eos_token,
        "unk_token": known.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        **for_batches(tokenizer, known.eos_token),
    }
    replace_file(folder / TOKENIZER, as_trained(text, tokenizer).encode())
    replace_json(folder / CONFIG, config)


def train(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE tokenizer with single digits, as `tokenizer.json` text. Ids 0 to 4: end of text and the FIM tokens.

    The same texts give the same tokenizer. vocab_size: bytes and special tokens at least, `MIN_VOCABULARY`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [END_OF_TEXT, *FIM_TOKENS]
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
    tokenizer.train_from_iterator((piece for text in texts for piece in _short_words(text)), trainer=trainer)
    return tokenizer.to_str(pretty=True)


#: A run that the splitting rule takes as one word. The trainer's time grows with the square of a word's length: 0.4 s of CPU for
#: 40,000 letters, hours for a megabyte (a genome, a minified table); nobody's longest identifier is as long as this.
_LONG_WORD = re.compile(r"[^\W\d_]{256}|(?:[^\s\w]|_){256}|\s{256}")


def _short_words(text: str) -> Iterator[str]:
    """The text in pieces without longer words, which is itself where it has none."""
    start = 0
    for found in _LONG_WORD.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    if start < len(text) or not text:
        yield text[start:]
