"""What a person is told of a job: what is left out of the input, and what was made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.cli import one_line
from data.filters.near_duplicates import MOST_ALIKE
from data.pipeline.arguments import PreprocessArguments
from data.shards import SPLITS
from data.sources.blocks import Block
from data.sources.discover import Source, describe_endings
from data.terminal import say, stdout


def say_left_out(sources: list[Source]) -> None:
    """What of the folders and trees is not read, so that nobody learns it from the result."""
    for source in sources:
        if source.left_out:
            where = source.name if source.kind == "tree" else os.path.dirname(source.name)
            hint = "; --suffixes names the endings of source files" if source.kind == "tree" else ""
            say(one_line(f"note: {where}: {describe_endings(source.left_out)} left out{hint}"), stdout)


def say_notes(blocks: Iterable[Block]) -> Iterator[Block]:
    """What of archives is not read is known when they are."""
    for block in blocks:
        if block.note:
            say(one_line(f"note: {block.note}"), stdout)
        yield block


def report(manifest: dict[str, Any], args: PreprocessArguments, seconds: float) -> None:
    """What was made, for a person."""
    output = args.output
    for split in SPLITS:
        s = manifest["splits"][split]
        size = f"{s['documents']:,} documents, {s['tokens']:,} tokens, {s['text_bytes']:,} bytes of text"
        say(f"{split}: {size}, {len(s['shards'])} shards", stdout)
    counts = manifest["documents"]
    for reason, count in counts["rejected"].items():
        say(f"rejected {count:,}: {reason} (see {output / 'rejected.jsonl'})", stdout)
    for reason, count in counts["removed"].items():
        say(f"removed {count:,}: {reason} (see {output / 'removed.jsonl'})", stdout)
    for file in args.decontaminate:
        if (reason := f"overlaps {Path(file).name}") not in counts["removed"]:
            say(f"removed 0: {reason}", stdout)
    if "fill_in_the_middle" in counts:
        say(f"rearranged for fill-in-the-middle: {counts['fill_in_the_middle']:,} documents or parts of long ones", stdout)
    if count := counts.get("not_indexed"):
        alike = f"each is like {MOST_ALIKE:,} before it and no near duplicate"
        say(
            f"note: nothing was compared with {count:,} documents: {alike}; a later near duplicate of theirs may have stayed",
            stdout,
        )
    rate = sum(s["tokens"] for s in manifest["splits"].values()) / max(seconds, 1e-9)
    say(f"{output}: {counts['read']:,} documents read in {seconds:.1f} s, {rate:,.0f} tokens/s", stdout)
    if not manifest["splits"]["validation"]["documents"]:
        say("note: no document fell into the validation split; raise --validation_fraction to evaluate on these shards", stdout)
