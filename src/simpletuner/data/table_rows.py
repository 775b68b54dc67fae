"""Rows of a table: CSV, JSONL or parquet, read one after the other from any source."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from simpletuner.data.sources import SourceFile
from simpletuner.errors import DataError, MissingExtra

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | None]]
MAX_LINE_BYTES = 1 << 20
ROWS_PER_BATCH = 1024
PARQUET_HINT = "parquet needs: pip install 'simpletuner[parquet]'"


def read_rows(table: SourceFile, table_format: str, columns: Collection[str] | None = None) -> Rows:
    """Yield (number from 1, row), or None for a row that cannot be read.

    columns: those of a parquet table that are read, where it has them; None is all. Raises
    DataError for a table that cannot be read, and MissingExtra for parquet without pyarrow.
    """
    try:
        if table_format == "parquet":
            yield from _read_parquet(table, columns)
        else:
            with table.open() as stream:
                yield from {"csv": _read_csv, "jsonl": _read_jsonl}[table_format](stream)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{table.address} cannot be read as {table_format}: {reason or error}"
        ) from error


def read_columns(table: SourceFile, table_format: str) -> tuple[str, ...]:
    """Return the names of the columns; of a JSONL table, those of its first readable row."""
    if table_format == "parquet":
        with open_parquet(table) as parquet:
            return tuple(parquet.schema_arrow.names)
    first = next((row for _, row in read_rows(table, table_format) if row is not None), {})
    return tuple(map(str, first))


@contextmanager
def open_parquet(table: SourceFile) -> Iterator[Any]:
    """Open a parquet file, of which only the needed parts are read. Raises DataError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra(f"{table.name}: {PARQUET_HINT}") from error
    try:
        with table.open_lazily() as stream, parquet.ParquetFile(stream) as opened:
            yield opened
    except ArrowException as error:
        raise DataError(f"{table.address} cannot be read as parquet: {error}") from error


def _read_csv(stream: BinaryIO) -> Rows:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    for number, row in enumerate(csv.DictReader(text), 1):
        complete = None not in row and None not in row.values()
        yield number, row if complete else None


def _read_jsonl(stream: BinaryIO) -> Rows:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield number, row if isinstance(row, dict) else None


def _read_parquet(table: SourceFile, columns: Collection[str] | None) -> Rows:
    number = 0
    with open_parquet(table) as parquet:
        names = parquet.schema_arrow.names
        chosen = None if columns is None else [name for name in names if name in columns]
        for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=chosen):
            for row in _plain_rows(batch):
                number += 1
                yield number, row


def _plain_rows(batch: Any) -> Iterator[Row]:
    """Yield the rows of a batch. Column by column is several times faster than to_pylist()."""
    names: Sequence[str] = batch.schema.names
    cells = [column.to_pylist() for column in batch.columns]
    for values in zip(*cells, strict=True):
        yield dict(zip(names, values, strict=True))


def choose_column(
    given: str | None, usual: Sequence[str], columns: Collection[str], content: str, table: str
) -> str:
    """Return the column that was given, or the first of the usual names that the table has.

    content: for the message, such as "image". Raises DataError.
    """
    name = given or next((name for name in usual if name in columns), None)
    if name is None or name not in columns:
        lacking = f"column {name}" if name else f"column of {content}s"
        raise DataError(
            f"{table}: has no {lacking}; it has {', '.join(columns)}. "
            f"Name the column in {content}_column"
        )
    return name
