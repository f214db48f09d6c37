"""Read the rows of a CSV, TSV, JSON Lines, JSON or Parquet file as Arrow tables.

CSV and JSON go through Python's parsers, a batch of rows at a time. Those of Arrow are twice as
fast, but drop a stray quote in silence, turn text that looks like a date into one, and name no
line.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from lib.data.files.paths import format_of
from lib.errors import InputError

ROWS_PER_BATCH = 65_536
# Part of the names of cached files: raise it when the readers give other rows for the same bytes.
READER_VERSION = 1


def read_tables(path: Path) -> Iterator[pyarrow.Table]:
    """Yield the rows of a file, at least one table; the values of CSV and TSV are text.

    TSV is read as GLUE writes it, without quoting.

    Raises:
        InputError: the contents are not what the file's name says.
    """
    ending, _ = format_of(path)
    try:
        yield from _READERS[ending](path)
    except UnicodeDecodeError as error:
        raise _invalid_utf8(path) from error
    except OSError as error:  # a damaged compressed file too
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    except (pyarrow.ArrowException, csv.Error, json.JSONDecodeError, OverflowError) as error:
        raise InputError(
            f"{path} is not the {ending[1:].upper()} its name says: {first_line(error)}"
        ) from error


def _open(path: Path) -> BinaryIO:
    _, compression = format_of(path)
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def _open_text(path: Path) -> TextIO:
    # newline="" leaves line ends inside quotes to the csv module; utf-8-sig drops Excel's mark.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="")


def _read_csv(path: Path) -> Iterator[pyarrow.Table]:
    return _read_delimited(path, strict=True)


def _read_tsv(path: Path) -> Iterator[pyarrow.Table]:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, **dialect: Any) -> Iterator[pyarrow.Table]:
    with _open_text(path) as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        _check_header(path, header, dialect.get("delimiter", ","))
        schema = pyarrow.schema([(name, pyarrow.string()) for name in header])
        yield schema.empty_table()
        rows = _complete_rows(path, header, reader)
        while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
            yield pyarrow.Table.from_arrays(
                [pyarrow.array(values, pyarrow.string()) for values in zip(*batch, strict=True)],
                schema=schema,
            )


def _check_header(path: Path, header: list[str], separator: str) -> None:
    if len(set(header)) < len(header):
        raise InputError(f"{path} has two columns of one name: {', '.join(header)}")
    others = [other for other in ",;\t|" if len(header) == 1 and other in header[0]]
    if others:
        remedy = {",": "name it .csv", "\t": "name it .tsv"}.get(
            others[0], "separate them by commas"
        )
        raise InputError(
            f"{path}: the columns are separated by {others[0]!r} ({header[0]!r}), not by "
            f"{separator!r} as its name says; {remedy}"
        )
    if separator == "\t" and header and all(_is_quoted(name) for name in header):
        raise InputError(
            f"{path}: the header is in quotes, and TSV is read without quoting; write it without "
            "quotes, or separate the columns by commas and name it .csv"
        )


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"'


def _complete_rows(
    path: Path, header: list[str], reader: Iterable[list[str]]
) -> Iterator[list[str]]:
    filled = (values for values in reader if values)  # skips blank lines
    for number, values in enumerate(filled, start=1):
        if len(values) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(values)} values where the header has {len(header)} "
                f"({', '.join(header)})"
            )
        yield values


def _read_json_lines(path: Path) -> Iterator[pyarrow.Table]:
    with _open_text(path) as file:
        yield _table_of_objects(path, _objects_of_lines(path, file))


def _objects_of_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}, column {error.pos + 1} is not JSON: {error.msg}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {line.strip()}")
        yield row


def _read_json(path: Path) -> Iterator[pyarrow.Table]:
    with _open_text(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            raise InputError(f"{path} holds several JSON values: name it .jsonl") from error
        raise
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path}: expected a list of objects, one for each row")
    yield _table_of_objects(path, content)


def _table_of_objects(path: Path, objects: Iterable[dict[str, Any]]) -> pyarrow.Table:
    """Columns of one type each; a value that a row lacks is null, and so is NaN.

    Raises:
        InputError: text and numbers, say, in one column.
    """
    rows = iter(objects)
    tables, num_rows = [pyarrow.table({})], 0
    first: dict[str, Any] = {}  # of each column, the first value that is there
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        columns = {}
        for name in dict.fromkeys(name for row in batch for name in row):
            values = [_null_for_nan(row.get(name)) for row in batch]
            for number, value in enumerate(values, start=num_rows + 1):
                if value is not None and not _same_kind(value, first.setdefault(name, value)):
                    raise InputError(
                        f"{path}, row {number}: {name} is {value!r}, and in the rows before "
                        f"{first[name]!r}: a column holds values of one kind"
                    )
            columns[name] = values
        tables.append(pyarrow.table(columns))
        num_rows += len(batch)
    # The types of the batches may differ: whole numbers in one, and decimals in the next.
    return pyarrow.concat_tables(tables, promote_options="permissive")


def _null_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _same_kind(value: Any, first: Any) -> bool:
    return type(value) is type(first) or {type(value), type(first)} == {int, float}


def _read_parquet(path: Path) -> Iterator[pyarrow.Table]:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        for index, field in enumerate(schema):
            if pyarrow.types.is_string_view(field.type):  # as Polars writes text
                schema = schema.set(index, field.with_type(pyarrow.string()))
        yield schema.empty_table()
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
            yield pyarrow.Table.from_batches([batch]).cast(schema)


_READERS: dict[str, Callable[[Path], Iterator[pyarrow.Table]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _invalid_utf8(path: Path) -> InputError:
    """The error for the first line that is no UTF-8."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return InputError(
                    f"{path}, line {number}: invalid UTF-8 (byte {line[error.start]:#04x}); save "
                    "the file as UTF-8"
                )
    raise AssertionError("only called for a file that is no UTF-8")


def first_line(error: BaseException) -> str:
    """Return what a library's error says, as one line."""
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
