"""The job's tokenizer: the one that was named, the copy in the output, or one trained on texts from all over the input."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from data.cli import UserError
from data.pipeline.arguments import PreprocessArguments
from data.sources.blocks import ReadOptions
from data.sources.discover import Source
from data.sources.documents import Document, read_documents
from data.sources.read import read_blocks
from data.terminal import say, stdout
from data.tokens import tokenizer as tokenizers
from data.tokens.folder import CONFIG, TokenizerFiles, load
from data.tokens.tokenizer import TokenizerFacts

T = TypeVar("T")

#: Byte-level BPE merges settle long before 16 MB, which train in 4 s on one core.
SAMPLE_BYTES = 16_000_000
SAMPLE_SOURCES = 32
SAMPLE_FILES = 4096


def check_tokenizer(args: PreprocessArguments) -> None:
    """Raises UserError where the file of --tokenizer is another one than that whose copy the folder has, and goes on with."""
    copy = args.output / "tokenizer"
    if args.tokenizer is None or not os.path.exists(args.tokenizer) or not (copy / CONFIG).is_file():
        return
    now, then = load(args.tokenizer), load(str(copy))
    changed = now.end_token not in (None, then.end_token)
    if now.text != then.text:  # saved anew, a file has other white space or a post-processor, and the same ids
        tokenizers.library_tokenizer(args.tokenizer, now.text)
        changed |= tokenizers.fingerprint(now.text) != tokenizers.fingerprint(then.text)
    if changed:
        raise UserError(f"--tokenizer {args.tokenizer} was written to since {args.output} was begun; name another --output")


def prepare_tokenizer(args: PreprocessArguments, sources: list[Source]) -> tuple[str, TokenizerFacts]:
    """Load or train it, and keep a copy in `tokenizer/`; a job that goes on uses that copy."""
    folder = args.output / "tokenizer"
    name = args.tokenizer or f"trained, {args.train_tokenizer} tokens"
    if (folder / CONFIG).is_file():
        files = load(str(folder))
    elif args.train_tokenizer is None:
        files = load(name)
    else:
        say(f"training a tokenizer of {args.train_tokenizer:,} tokens on a sample of the input", stdout)
        files = TokenizerFiles(tokenizers.train(sample_texts(args, sources), args.train_tokenizer))
    tokenizer = tokenizers.library_tokenizer(name, files.text)
    facts = tokenizers.facts(name, files, tokenizer)
    tokenizers.save(folder, files.text, facts)
    say(f"documents end with {facts.eos_token!r} (id {facts.eos_token_id}{', ' if files.named_by else ''}{files.named_by})", stdout)
    fim = (facts.fim or {}) if args.fim_rate else {}
    tokenizers.check_reach(name, files.text, {facts.eos_token: facts.eos_token_id, **{f"<fim_{t}>": i for t, i in fim.items()}})
    if fim:
        tokenizers.check_cuts(name, tokenizer)
    if lossy := tokenizers.lossy_example(tokenizer):
        say(f"warning: tokenizer {name} does not keep text: {lossy[0]!r} comes back as {lossy[1]!r}")
    return files.text, facts


def sample_texts(args: PreprocessArguments, sources: list[Source]) -> Iterator[str]:
    """At most SAMPLE_BYTES characters: equal shares of up to 32 sources and 4,096 files of each tree, spread evenly."""
    chosen = spread(sources, SAMPLE_SOURCES)
    field = (args.text_field,)
    options = ReadOptions(columns=field, needed=field, suffixes=args.suffixes, hub_split=args.split, verify=False)
    for source in chosen:
        left = SAMPLE_BYTES // len(chosen)
        sample = replace(source, files=tuple(spread(source.files, SAMPLE_FILES)))
        for block in read_blocks([sample], options):
            for item in read_documents(block, args.text_field):
                if isinstance(item, Document) and left > 0:
                    text = item.text[: min(left, args.max_document_bytes)]
                    left -= len(text)
                    yield text
            if left <= 0:
                break


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, at equal distances."""
    return items[:: max(math.ceil(len(items) / count), 1)]
