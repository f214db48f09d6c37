"""Write rows with their predictions as JSON Lines, CSV or Parquet, a window at a time."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from lib.checkpoints.atomic import replacing
from lib.errors import InputError

Array = NDArray[Any]

# What makes a spreadsheet take a cell for a formula, and the numbers that begin so.
# Source: OWASP, "CSV Injection" (owasp.org/www-community/attacks/CSV_Injection); ASVS 5.0, 1.2.10.
FORMULA_STARTS = tuple("=+-@\t\r\n\0＝＋－＠")  # noqa: RUF001
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def with_predictions(
    rows: pyarrow.Table, predictions: Array, probabilities: Array | None, names: Sequence[str]
) -> pyarrow.Table:
    """Return `rows` with the columns `prediction` and, for classes, `probabilities`.

    Args:
        predictions: (rows,) class numbers, or scores for a regression.
        probabilities: (rows, classes); None for a regression.
        names: of the classes.
    """
    if probabilities is None:
        return rows.append_column("prediction", pyarrow.array(predictions, pyarrow.float64()))
    named = pyarrow.array([names[number] for number in predictions], pyarrow.string())
    columns = [pyarrow.array(column) for column in probabilities.T]
    by_class = pyarrow.StructArray.from_arrays(columns, names=list(names))
    return rows.append_column("prediction", named).append_column("probabilities", by_class)


def new_columns(names: Sequence[str]) -> set[str]:
    """The names of the columns that a prediction adds, in any of the formats."""
    return {"prediction", "probabilities", *(f"probability_{name}" for name in names)}


def check_output(flag: str, path: Path, *, overwrite: bool) -> None:
    """Check that a new file can be written, or an old one replaced if that is asked for.

    Raises:
        InputError: it exists, or its folder does not.
    """
    if path.exists() and (path.is_dir() or not overwrite):
        raise InputError(f"{flag} {path} exists: give another name, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: no folder {path.parent}; create it first")


def write_tables(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    """Write tables of the same columns to a file of the format that its name says.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as new:
        WRITERS[path.suffix](new, tables)


def _write_json_lines(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                # Parquet may hold dates and decimals, which JSON has no type for.
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_csv(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)  # with another line end it would not quote a text that holds \r
        for number, table in enumerate(map(_flat, tables)):
            if number == 0:
                writer.writerow(map(neutral, table.column_names))
            columns = [map(neutral, column.to_pylist()) for column in table.columns]
            writer.writerows(zip(*columns, strict=True))


def _write_parquet(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    writer = None
    try:
        for table in map(_flat, tables):
            plain = table.replace_schema_metadata()  # that of `datasets` lists the old columns
            writer = writer or pyarrow.parquet.ParquetWriter(path, plain.schema)
            writer.write_table(plain)
    finally:
        if writer is not None:
            writer.close()


WRITERS: dict[str, Callable[[Path, Iterable[pyarrow.Table]], None]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _flat(table: pyarrow.Table) -> pyarrow.Table:
    """The table with a column `probability_<class>` for each field of `probabilities`."""
    if "probabilities" not in table.column_names:
        return table
    by_class = table.column("probabilities").combine_chunks()
    table = table.drop_columns("probabilities")
    for field in by_class.type:
        table = table.append_column(f"probability_{field.name}", by_class.field(field.name))
    return table


def neutral(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula: those get a `'` in front."""
    risky = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if risky and not NUMBER.fullmatch(value) else value
