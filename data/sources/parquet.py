"""Parquet files as rows, however the writer chose to hold a string: plain or by dictionary, as string, large_string, string_view,
binary, in a struct.

Text is read as bytes and becomes text one value at a time: for pyarrow one invalid byte spoils a whole batch. And nothing is
decoded before its size was looked at: a dictionary of one value of 150 MB, which 2,000 rows name, makes a file of 14 kB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.sources import blocks
from data.sources.blocks import Block, Fault, Position, ReadOptions
from data.sources.discover import Source
from data.sources.tables import TOO_LONG, row_blocks

ROWS_A_BATCH = 64
#: What a batch may hold when it is decoded: fewer rows are taken at a time where they are long.
BATCH_BYTES = 128 << 20
#: A single row beyond this is refused undecoded.
MAX_ROW_BYTES = 1 << 30


class Column(NamedTuple):
    """A field of the rows: its name as asked for, the path of names to it, and the file's leaf columns below it."""

    name: str
    path: tuple[str, ...]
    leaves: range


def parquet_blocks(source: Source, here: Position, options: ReadOptions) -> Iterator[Block]:
    """Rows from `here` on. The file is decoded once to its end before its first row is used: pages have no checksum to trust."""
    import pyarrow

    try:
        if here.offset == 0 and options.verify:
            for _ in _batches(source.at, options):
                pass
        yield from row_blocks(_rows(source.at, here.offset, options), source, here)
    except MemoryError as error:  # pyarrow's own is one, too
        raise Fault("Parquet file that needs more memory than there is", _first_line(error)) from error
    except pyarrow.ArrowNotImplementedError as error:
        raise Fault("Parquet file of a kind that is not read", _first_line(error)) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the decoder's
            raise Fault(blocks.CANNOT_BE_READ, os.strerror(error.errno)) from error
        raise Fault("damaged Parquet file", _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rows(path: str, skip: int, options: ReadOptions) -> Iterator[dict[str, Any]]:
    for columns, batch in _batches(path, options):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        values = [_values(_reached(batch, column).slice(skip)) for column in columns]
        for column, found in zip(columns, values, strict=True):
            if column.name not in options.needed:
                found[:] = map(_decoded, found)
        names = [column.name for column in columns]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
        skip = 0


def _batches(path: str, options: ReadOptions) -> Iterator[tuple[list[Column], Any]]:
    """(columns, record batch) of all rows in order, at most BATCH_BYTES or one row at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        columns = _find_columns(file.schema_arrow, options)
        leaves = [leaf for column in columns for leaf in column.leaves]
        plan = [_plan(path, file.metadata.row_group(group), leaves) for group in range(file.metadata.num_row_groups)]
    kept = sorted({column for group in plan for column in group.kept_dictionaries})
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=kept) as file:
        for number, group in enumerate(plan):
            for batch in file.reader.iter_batches(group.rows, [number], column_indices=leaves, use_threads=False):
                yield columns, batch


class GroupPlan(NamedTuple):
    """How a row group is decoded: so many rows together, and columns whose dictionary is not multiplied into rows."""

    rows: int
    kept_dictionaries: list[str]


def _plan(path: str, group: Any, leaves: list[int]) -> GroupPlan:
    """By sizes alone, before anything is decoded. Raises Fault where a row would be longer than any document may be.

    To keep dictionaries costs 40 times the time of decoding them, so it is done only where one has room for a value that must not
    be copied into rows at all.
    """
    longest, kept = 1, []
    for leaf in leaves:
        chunk = group.column(leaf)
        values_a_row = math.ceil(chunk.num_values / max(group.num_rows, 1))
        average = chunk.total_uncompressed_size // max(group.num_rows, 1)
        value = _longest_value(path, chunk)
        if value > blocks.MAX_LINE_BYTES and chunk.physical_type == "BYTE_ARRAY" and "DELTA_BYTE_ARRAY" not in chunk.encodings:
            kept.append(chunk.path_in_schema)
            value = 0
        if average > blocks.MAX_LINE_BYTES or value * values_a_row > MAX_ROW_BYTES:
            kind = "Parquet file of rows that are too long"
            raise Fault(kind, f"up to {max(average, value * values_a_row):,} bytes, {blocks.MAX_LINE_BYTES:,} are read")
        longest = max(longest, average, value * values_a_row)
    return GroupPlan(max(min(ROWS_A_BATCH, BATCH_BYTES // longest), 1), kept)


def _longest_value(path: str, chunk: Any) -> int:
    """What one value can take in memory beyond its share of the file: a whole dictionary, or a prefix of all that is before it."""
    if not chunk.num_values or chunk.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
        return 0
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return int(chunk.total_uncompressed_size)
    return _dictionary_bytes(path, chunk)


def _dictionary_bytes(path: str, chunk: Any) -> int:
    """Decompressed size of a column chunk's dictionary page, 0 where it has none.

    From the page's own header (Thrift's compact protocol; parquet.thrift, PageHeader): fields 1 to 3, page type and both sizes,
    always come first, each as a byte 0x15 (the next field, an i32) and a zigzag number. 2 is the type of a dictionary page.
    """
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    with open(path, "rb") as file:
        file.seek(start)
        header = file.read(16)
    kind, at = _header_field(header, 0)
    size, _ = _header_field(header, at)
    return size if kind == 2 else 0


def _header_field(header: bytes, at: int) -> tuple[int, int]:
    """(value of the i32 field that begins at `at`, where the next begins)."""
    if header[at : at + 1] != b"\x15":
        raise ValueError("a page header that does not begin with its type and size")
    value = shift = 0
    for number, byte in enumerate(header[at + 1 :], at + 2):
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value >> 1, number
    raise ValueError("a page header that is cut off")


def _find_columns(schema: Any, options: ReadOptions) -> list[Column]:
    """The columns that are wanted and there. Raises Fault where one that is needed is missing or there twice."""
    found = []
    for name in dict.fromkeys(options.columns):
        matches = list(_matches(schema, name, 0))
        needed = name in options.needed
        if needed and not matches:
            raise Fault(f"no column {name}", f"only {', '.join(schema.names[:8])}")
        if needed and len(matches) > 1:
            raise Fault(f"more than one column {name}", "rename all but one")
        found += [Column(name, *match) for match in matches[:1]]
    if not found:
        raise Fault(f"no column {' or '.join(options.columns)}", f"only {', '.join(schema.names[:8])}")
    return found


def _matches(fields: Any, name: str, first: int) -> Iterator[tuple[tuple[str, ...], range]]:
    """(path, leaf columns) of all fields of this name; `a.b` is a column of that name, or b in the struct a."""
    import pyarrow

    for field in fields:
        leaves = _count_leaves(field.type)
        if field.name == name:
            yield (field.name,), range(first, first + leaves)
        elif name.startswith(f"{field.name}.") and pyarrow.types.is_struct(field.type):
            inner = name.removeprefix(f"{field.name}.")
            yield from (((field.name, *path), found) for path, found in _matches(field.type, inner, first))
        first += leaves


def _count_leaves(kind: Any) -> int:
    """How many of the file's columns an Arrow type is spread over."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _count_leaves(kind.storage_type)
    return sum(_count_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _reached(batch: Any, column: Column) -> Any:
    """The array at the column's path; where a struct is null, its fields are."""
    import pyarrow.compute as pc

    array = batch.column(batch.schema.names.index(column.path[0]))
    for name in column.path[1:]:
        array = pc.struct_field(array, [array.type.get_field_index(name)])
    return array


def _values(array: Any) -> list[Any]:
    """The array as Python values, strings as bytes. TOO_LONG stands for what no document may hold: it is never copied."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        chosen = array.indices.to_pylist()
        # Slice by slice: `take` would copy values that are longer than a document may be.
        values = {i: _values(array.dictionary.slice(i, 1))[0] for i in {*chosen} - {None}}
        return [None if i is None else values[i] for i in chosen]
    kind = _as_bytes(array.type)
    array = array if kind == array.type else array.cast(kind)
    if pa.types.is_large_binary(kind):
        lengths = pc.binary_length(array)
        if (pc.max(lengths).as_py() or 0) > blocks.MAX_LINE_BYTES:
            long = pc.fill_null(pc.greater(lengths, blocks.MAX_LINE_BYTES), False).to_pylist()
            return [TOO_LONG if is_long else array[i].as_py() for i, is_long in enumerate(long)]
    try:
        found: list[Any] = array.to_pylist()
        return found
    except (ValueError, OverflowError):
        return [_one_value(value) for value in array]


def _decoded(value: Any) -> Any:
    """Strings of a field that is not the text: an invalid byte makes one that no list of licenses has."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _one_value(value: Any) -> Any:
    """A date beyond Python's, an invalid string inside something larger: this value is lost, not its row."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return None


def _as_bytes(kind: Any) -> Any:
    """The type with every string as binary, inside lists and structs too."""
    import pyarrow as pa

    if any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)):
        return pa.large_binary()
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(pa.field(kind.value_field.name, _as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _as_bytes(f.type)) for f in kind])
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    return kind
