"""Check the columns, texts and labels of raw rows, and number the labels.

Works on Arrow columns: of texts it looks at the lengths, of labels at the distinct values. A row
becomes a Python object only where an error reports it.
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset

from lib.data.files.place import Place
from lib.data.tasks import IGNORED
from lib.errors import InputError


def guess_text_columns(rows: Dataset, where: Place, label_column: str) -> tuple[str, ...]:
    """The columns `sentence1` and `sentence2`, or the only one or two that hold no label.

    Raises:
        InputError: there are more.
    """
    if {"sentence1", "sentence2"} <= set(rows.column_names):
        return ("sentence1", "sentence2")
    others = tuple(name for name in rows.column_names if name not in (label_column, "idx"))
    if len(others) in (1, 2):
        return others
    raise InputError(
        f"{where}: cannot tell which columns are text (found: {', '.join(rows.column_names)}); "
        "name them with --text_columns"
    )


def check_not_empty(rows: Dataset, where: Place) -> None:
    """Refuse a split without rows with an InputError."""
    if not len(rows):
        raise InputError(f"{where} has no rows: it needs at least one")


def check_column_names(
    rows: Dataset, where: Place, text_columns: Sequence[str], label_column: str | None
) -> None:
    """Check that the columns exist; None for a label column that may be absent.

    Raises:
        InputError: one does not, or is named twice.
    """
    if len({*text_columns, label_column}) <= len(text_columns):
        raise InputError(
            f"{where}: the text columns ({', '.join(text_columns)}) and the label column "
            f"({label_column}) must differ: see --text_columns and --label_column"
        )
    if "labels" in text_columns:
        raise InputError(f"{where}: a text column cannot have the name labels; rename it")
    for name in (*text_columns, label_column):
        if name is not None and name not in rows.column_names:
            flag = "--label_column" if name == label_column else "--text_columns"
            raise InputError(
                f"{where}: no column {name} (found: {', '.join(rows.column_names)}); name yours "
                f"with {flag}"
            )


def class_names(rows: Dataset, where: Place, label_column: str) -> tuple[str, ...]:
    """Names of the classes, sorted (numbers by value); empty if the labels are scores.

    Raises:
        InputError: the labels are lists, or of two kinds, or neither classes nor scores.
    """
    feature = rows.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    column = _label_column(rows, where, label_column)
    values = [value for value in pc.unique(column).to_pylist() if not _is_missing(value)]
    _check_kind(values, column, where, label_column)
    if all(isinstance(value, bool) for value in values):
        return tuple(str(value) for value in sorted(values))
    if values and all(_is_int(value) for value in values):
        return tuple(str(number) for number in sorted({int(value) for value in values}))
    if values and all(_is_float(value) for value in values):
        if all(float(value).is_integer() for value in values):
            raise InputError(
                f"{where}: {label_column} holds whole numbers with a decimal point "
                f"({values[0]!r}): write them without for classes, or give --task_name stsb for "
                "scores"
            )
        return ()
    return tuple(sorted({str(value) for value in values}))


def _label_column(rows: Dataset, where: Place, label_column: str) -> pyarrow.ChunkedArray:
    column = rows.data.column(label_column)
    if pyarrow.types.is_nested(column.type):
        raise InputError(f"{where}: {label_column} must hold one label for each row")
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return pc.utf8_trim_whitespace(column) if is_text else column


def _check_kind(
    values: Sequence[Any], column: pyarrow.ChunkedArray, where: Place, label_column: str
) -> None:
    """Check that labels are numbers or names, and not numbers with a slip among them.

    Args:
        values: the distinct labels, in the order of their first rows.

    Raises:
        InputError: naming the first row whose label is of another kind than that of the first.
    """
    for value in values:
        if _is_float(value) != _is_float(values[0]):
            row = pc.index(column, value).as_py()
            raise InputError(
                f"{where.row(row)}: {label_column} is {value!r}, and in the rows before "
                f"{values[0]!r}: labels are all numbers or all names"
            )


def check_texts(
    rows: Dataset, where: Place, text_columns: Sequence[str], *, may_be_empty: bool
) -> None:
    """Check that every row has its texts.

    Raises:
        InputError: naming the first row that has none, or something else.
    """
    for name in text_columns:
        column = rows.data.column(name)
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        row = _first_missing(column, may_be_empty=may_be_empty) if is_text else 0
        if row is not None:
            text = column[row].as_py()
            shown = "nothing" if text is None or text == "" else repr(text)
            raise InputError(
                f"{where.row(row)}: {name} must be text, found {shown}; complete or remove the row"
            )


def _first_missing(column: pyarrow.ChunkedArray, *, may_be_empty: bool) -> int | None:
    start = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk)  # from the offsets: the texts stay on the disk
        suspicious = pc.is_in(lengths, pyarrow.array([None, 0, len("nan")], lengths.type))
        for index in pc.indices_nonzero(suspicious).to_pylist():
            text = chunk[index].as_py()
            if text is None or (_is_missing(text) and not may_be_empty):
                return start + index
        start += len(chunk)
    return None


def number_labels(
    rows: Dataset,
    where: Place,
    label_column: str,
    names: Sequence[str],
    *,
    test: bool,
    by_number: bool,
) -> pyarrow.ChunkedArray:
    """The number of each row's label: int64 for classes, float64 for scores.

    Args:
        names: of the classes; empty for scores.
        test: labels may be missing, or -1 in all rows as GLUE withholds them; they are `IGNORED`.
        by_number: labels may be numbers from 0 instead of names.

    Raises:
        InputError: naming the first row whose label is missing or unknown.
    """
    kind = pyarrow.int64() if names else pyarrow.float64()
    ignored = pyarrow.scalar(IGNORED, kind)
    if label_column not in rows.column_names:
        return pyarrow.chunked_array([pyarrow.repeat(ignored, len(rows))])
    column = _label_column(rows, where, label_column)
    values = pc.unique(column)
    if test and all(_is_float(value) and float(value) == -1 for value in values.to_pylist()):
        return pyarrow.chunked_array([pyarrow.repeat(ignored, len(rows))])
    # A column of class numbers already counts from 0, in the order of the names.
    numbered = isinstance(rows.features[label_column], datasets.ClassLabel)
    numbers = []
    for position, value in enumerate(values.to_pylist()):
        try:
            numbers.append(
                IGNORED
                if test and _is_missing(value)
                else _number_of(value, names, numbered=numbered, by_number=by_number)
            )
        except InputError as problem:
            row = pc.index(pc.index_in(column, values), position).as_py()
            raise InputError(f"{where.row(row)}, column {label_column}: {problem}") from None
    numbers = pyarrow.array(numbers, kind)
    chunks = [numbers.take(pc.index_in(chunk, values)) for chunk in column.chunks]
    return pyarrow.chunked_array(chunks, kind)


def _number_of(label: Any, names: Sequence[str], *, numbered: bool, by_number: bool) -> int | float:
    if _is_missing(label):
        raise InputError("the label is missing; complete or remove the row")
    if not names:
        if not _is_float(label):
            raise InputError(f"label must be a number, found {label!r}")
        return float(label)
    if str(label) in names and not numbered:
        return names.index(str(label))
    if (numbered or by_number) and _is_int(label) and 0 <= int(label) < len(names):
        return int(label)
    raise InputError(
        f"unknown label {label!r}; known from the task or the training rows: {', '.join(names)}; "
        "correct it, or add it to the training rows"
    )


def _is_int(value: Any) -> bool:
    if isinstance(value, (bool, float)):
        return False
    try:
        int(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_float(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_missing(value: Any) -> bool:
    """Recognize a missing label or text: None, NaN, an empty field of CSV, or its `nan`."""
    if isinstance(value, str):
        return value == "" or value.lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))
