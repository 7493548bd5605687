"""Rows of Parquet files and of hub data sets as blocks. Loads pyarrow or datasets only when there is such an input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.compressed import Fault
from data.corpus import Source
from data.readers import BLOCK_BYTES, MAX_LINE_BYTES, Block, Position, ReadOptions, too_long

ROWS_A_BATCH = 64  # of rows of 1 MB still only 64 MB


def parquet_blocks(source: Source, number: int, here: Position, options: ReadOptions) -> Iterator[Block]:
    """Rows from `here` on. The file is decoded once to its end before its first row is used: pages have no checksum to trust."""
    import pyarrow

    try:
        if here.offset == 0:
            for _ in _batches(source.name, options):
                pass
        yield from _row_blocks(_rows(source.name, here.offset, options), source, number, here)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Fault(f"damaged Parquet file ({str(error).splitlines()[0]})") from error


def _batches(path: str, options: ReadOptions) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        names = file.schema_arrow.names
        if options.columns[0] not in names:
            raise Fault(f"no column {options.columns[0]}, only {', '.join(names[:8])}")
        columns = [c for c in options.columns if c in names]
        yield from file.iter_batches(ROWS_A_BATCH, columns=columns, use_threads=False)


def _rows(path: str, skip: int, options: ReadOptions) -> Iterator[dict[str, Any]]:
    """Text as bytes: pyarrow would raise for a whole batch over one invalid character."""
    import pyarrow

    for batch in _batches(path, options):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        text = batch.schema.get_field_index(options.columns[0])
        if str(batch.column(text).type) in ("string", "large_string"):
            batch = batch.set_column(text, options.columns[0], batch.column(text).cast(pyarrow.large_binary()))
        yield from batch.slice(skip).to_pylist()
        skip = 0


def hub_blocks(source: Source, number: int, here: Position, options: ReadOptions) -> Iterator[Block]:
    """Rows of `datasets.load_dataset(NAME, streaming=True)`. A stream that breaks stops the job: the rest must not be lost."""
    rows = here.offset
    try:
        for block in _row_blocks(_hub_rows(source.name, rows, options), source, number, here):
            rows = block.after.offset
            yield block
    except Exception as error:  # the hub, the network, the builder of that data set: anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data set {source.name} stopped after {rows} rows ({reason}); run the same command again to go on there, "
            "or download its files and give them to --input"
        ) from error


def _hub_rows(name: str, skip: int, options: ReadOptions) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    stream = datasets.load_dataset(name, split=options.hub_split, streaming=True)
    if stream.column_names and options.columns[0] not in stream.column_names:
        raise ValueError(f"no column {options.columns[0]}, only {', '.join(stream.column_names)}")
    for row in stream.skip(skip) if skip else stream:
        yield {c: row.get(c) for c in options.columns if c in row}


def _row_blocks(rows: Iterator[dict[str, Any]], source: Source, number: int, here: Position) -> Iterator[Block]:
    """Rows are numbered from 1, as lines are."""
    block = Block(name=source.name, after=here, done_bytes=0)
    size = 0
    for index, row in enumerate(rows, here.offset + 1):
        length = max((len(v) for v in row.values() if isinstance(v, (str, bytes))), default=0)
        if length > MAX_LINE_BYTES:
            block.faults.append((source.name, index, too_long()))
        else:
            block.rows.append((source.name, index, row))
        size += length
        if size >= BLOCK_BYTES:
            block.after = Position(source=number, offset=index)
            yield block
            block, size = Block(name=source.name, after=block.after, done_bytes=0), 0
        block.after = Position(source=number, offset=index)
    if block.rows or block.faults:
        yield block
