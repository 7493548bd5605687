"""Texts to train a tokenizer on, from all over the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from data.pipeline.arguments import PreprocessArguments
from data.sources.blocks import ReadOptions
from data.sources.discover import Source
from data.sources.documents import Document, read_documents
from data.sources.read import read_blocks

T = TypeVar("T")

#: Byte-level BPE merges settle long before 16 MB, which train in 4 s on one core.
SAMPLE_BYTES = 16_000_000
SAMPLE_SOURCES = 32
SAMPLE_FILES = 4096


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
