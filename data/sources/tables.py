"""Rows of tables as blocks, and the rows of hub data sets. Loads datasets only when there is such an input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data.cli import UserError
from data.sources import blocks
from data.sources.blocks import MISSING, Block, Position, ReadOptions, Rejection, Row, field_of
from data.sources.discover import Source

#: In place of a value that is longer than any document may be.
TOO_LONG = object()
#: What a value, and a row, take beside their text: a column of 4,000,000 nulls, a file of 12 kB, has no text at all.
VALUE_BYTES, ROW_BYTES = 64, 512


def hub_blocks(source: Source, here: Position, options: ReadOptions) -> Iterator[Block]:
    """Rows of `datasets.load_dataset(NAME, streaming=True)`. A stream that breaks stops the job: the rest must not be lost."""
    rows = here.offset
    try:
        for block in row_blocks(_hub_rows(source.name, rows, options), source, here):
            rows = block.after.offset
            yield block
    except UserError:  # going on would not help
        raise
    except Exception as error:  # the hub, the network, the builder of that data set: anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set {source.name} stopped after {rows} rows ({reason}); run the same command again to go on there, "
            "or download its files and give them to --input"
        ) from error


def _hub_rows(name: str, skip: int, options: ReadOptions) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    stream = datasets.load_dataset(name, split=options.hub_split, streaming=True)
    wanted, known = options.columns[0], stream.column_names
    if known and not any(wanted == name or wanted.startswith(f"{name}.") for name in known):
        raise UserError(
            f"data set {name} has no column {wanted}, only {', '.join(known)}; name the one of the text with --text_field"
        )
    for row in stream.skip(skip) if skip else stream:
        yield {c: value for c in options.columns if (value := field_of(row, c)) is not MISSING}


def row_blocks(rows: Iterator[dict[str, Any]], source: Source, here: Position) -> Iterator[Block]:
    """Rows are numbered from 1, as lines are."""
    block = Block(name=source.name, after=here, done_bytes=0)
    size = 0
    for index, row in enumerate(rows, here.offset + 1):
        sizes = [_size(value) for value in row.values()]
        if max(sizes, default=0) > blocks.MAX_LINE_BYTES or TOO_LONG in row.values():
            block.rejections.append(Rejection(source.name, index, blocks.too_long()))
        else:
            block.rows.append(Row(source.name, index, row))
        size += sum(sizes) + ROW_BYTES
        if size >= blocks.BLOCK_BYTES:
            block.after = Position(source=here.source, offset=index)
            yield block
            block, size = Block(name=source.name, after=block.after, done_bytes=0), 0
        block.after = Position(source=here.source, offset=index)
    if block.rows or block.rejections:
        yield block


def _size(value: Any) -> int:
    """Some bytes of memory, of what is nested too."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values())) + VALUE_BYTES
    return sum(map(_size, value)) + VALUE_BYTES if isinstance(value, (list, tuple)) else VALUE_BYTES
