"""Texts to train a tokenizer on, from all over the input."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from data.corpus import Source
from data.documents import Document, read_documents
from data.readers import ReadOptions, read_blocks

#: Byte-level BPE merges settle long before 16 MB, which train in 4 s on one core.
SAMPLE_BYTES = 16_000_000
SAMPLE_SOURCES = 32
SAMPLE_FILES = 4096


def sample_texts(args: argparse.Namespace, sources: list[Source]) -> Iterator[str]:
    """At most SAMPLE_BYTES characters: equal shares of up to 32 sources and 4,096 files of each tree, spread evenly."""
    chosen = sources[:: -(-len(sources) // SAMPLE_SOURCES)]
    options = ReadOptions(columns=(args.text_field,), hub_split=args.split, verify=False)
    for source in chosen:
        left = SAMPLE_BYTES // len(chosen)
        spread = replace(source, files=source.files[:: -(-len(source.files) // SAMPLE_FILES) or 1])
        for block in read_blocks([spread], options):
            for item in read_documents(block, args.text_field):
                if isinstance(item, Document) and left > 0:
                    text = item.text[: min(left, args.max_document_bytes)]
                    left -= len(text)
                    yield text
            if left <= 0:
                break
