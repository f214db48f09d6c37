"""The rows to predict: files as training reads them, with labels or without."""

import dataclasses
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset
from numpy.typing import NDArray

from lib.data import checks
from lib.data.files.paths import expand
from lib.data.files.place import Place
from lib.data.sources import read_file
from lib.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Checked rows, mapped from Arrow files, with all of their columns.

    `labels` is (rows,), `IGNORED` where a row has none; `name` tells the contents of the files
    from any others.
    """

    rows: Dataset
    text_columns: tuple[str, ...]
    labels: NDArray[Any]
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def window(self, start: int, count: int) -> pyarrow.Table:
        """Rows `start` up to `start + count`, or to the last."""
        return self.rows.data.slice(start, count).table

    def texts(self, start: int, count: int) -> dict[str, list[str]]:
        """The text columns of a window."""
        return self.window(start, count).select(self.text_columns).to_pydict()


def read_rows(
    patterns: Sequence[str],
    *,
    text_columns: tuple[str, ...],
    label_column: str,
    label_names: Sequence[str],
    by_number: bool,
    new_columns: AbstractSet[str],
) -> Rows:
    """Read files, one after the other, and check their texts and labels.

    Args:
        patterns: files, globs, and folders of files.
        label_names, by_number: as for `checks.number_labels`.
        new_columns: names that the predictions need.

    Raises:
        InputError: names the file, the row and the column of what cannot be used.
    """
    paths = expand("FILE", patterns)
    parts: list[Dataset] = []
    labels = []
    for path in paths:
        rows, where = read_file(path), Place(str(path))
        checks.check_not_empty(rows, where)
        checks.check_column_names(rows, where, text_columns, None)
        checks.check_texts(rows, where, text_columns, may_be_empty=False)
        taken = new_columns & set(rows.column_names)
        if taken:
            raise InputError(
                f"{where}: the predictions need the name {', '.join(sorted(taken))}; rename that "
                "column"
            )
        if parts:
            _check_same_columns(parts[0], paths[0], rows, path)
        parts.append(rows.select_columns(parts[0].column_names) if parts else rows)
        numbers = checks.number_labels(
            rows, where, label_column, label_names, test=True, by_number=by_number
        )
        labels.append(numbers.to_numpy())
    name = " ".join(rows._fingerprint for rows in parts)
    return Rows(datasets.concatenate_datasets(parts), text_columns, np.concatenate(labels), name)


def _check_same_columns(first: Dataset, first_where: Path, rows: Dataset, where: Path) -> None:
    if set(rows.column_names) != set(first.column_names):
        raise InputError(
            f"{where} has the columns {', '.join(rows.column_names)}, and {first_where} "
            f"{', '.join(first.column_names)}: give files of the same columns"
        )
    for name in first.column_names:
        kinds = [str(part.data.schema.field(name).type) for part in (first, rows)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{where}: {name} holds {kinds[1]}, and in {first_where} {kinds[0]}: give files of "
                "one format, or predict them one by one"
            )
