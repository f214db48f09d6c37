"""What a user should know of rows that are valid, but may not be what was meant."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset

from lib.data.files.paths import format_of
from lib.data.files.place import Place
from lib.data.rows.hashes import text_hashes
from lib.data.tasks import IGNORED
from lib.data.tokenizing import row_lengths

# Rows of the largest class for each row of the smallest, from which accuracy says little of it.
UNBALANCED = 10

# As `csv` and pandas write a field that holds a quote: in quotes, and the quote doubled.
QUOTED_FIELD = r'^"([^"]|"")*""([^"]|"")*"$'


def file_notices(
    rows: Dataset, place: Place, text_columns: Sequence[str], label_column: str
) -> Iterator[str]:
    """Describe what reading the raw rows of a split changed or left, though it may surprise."""
    if label_column in rows.column_names:
        column = rows.data.column(label_column)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            changed = pc.not_equal(column, pc.utf8_trim_whitespace(column))
            if count := pc.sum(changed).as_py():
                first = column[pc.index(changed, True).as_py()].as_py()
                yield f"{place}: removed the spaces around {count:,} labels, such as {first!r}"
    if any(format_of(Path(file))[0] == ".tsv" for file, _ in place.files):
        columns = [rows.data.column(name) for name in text_columns]
        quoted = [pc.sum(pc.match_substring_regex(column, QUOTED_FIELD)) for column in columns]
        if count := sum(number.as_py() or 0 for number in quoted):
            yield (
                f"{place}: {count:,} texts keep the quotes that they were written in: TSV is read "
                "without quoting, as GLUE writes it; save the rows as CSV if quotes are not text"
            )


def row_notices(
    labels: Sequence[str],
    splits: Mapping[str, Dataset],
    tokenized: Mapping[str, Dataset],
    max_length: int,
) -> Iterator[str]:
    """Describe unbalanced classes, rows that are in several splits, and truncated rows.

    Args:
        labels: names of the classes.
        splits: checked rows by split, the training rows as `train`.
        tokenized: the same rows, tokenized.
        max_length: tokens at which they were cut.
    """
    yield from _class_notices(labels, splits["train"].data.column("labels").to_numpy())
    hashes = text_hashes(splits["train"])
    for split, rows in splits.items():
        if split == "train" or pc.all(pc.equal(rows.data.column("labels"), IGNORED)).as_py():
            continue
        if count := int(np.isin(text_hashes(rows), hashes).sum()):
            yield (
                f"{count:,} of the {len(rows):,} {split} rows have the texts of a training row: "
                "their scores show what was learned by heart"
            )
    truncated = {
        name: int((row_lengths(rows) == max_length).sum()) for name, rows in tokenized.items()
    }
    found = [
        f"{count:,} of {len(tokenized[name]):,} {name} rows"
        for name, count in truncated.items()
        if count
    ]
    if found:
        yield f"truncated to --max_length {max_length} tokens, if longer: {', '.join(found)}"


def _class_notices(labels: Sequence[str], numbers: Any) -> Iterator[str]:
    if not labels:
        return
    counts = np.bincount(numbers, minlength=len(labels))
    if missing := [name for name, count in zip(labels, counts, strict=True) if not count]:
        yield f"no training row has the label {' or '.join(map(repr, missing))}"
    alike = defaultdict(list)
    for name, count in zip(labels, counts, strict=True):
        key = re.sub(r"[\s_-]+", " ", name.casefold())
        alike[key].append(f"{name!r} ({count:,} training rows)")
    for names in alike.values():
        if len(names) > 1:
            yield f"{' and '.join(names)} are not written alike, and different classes"
    least = int(np.argmin(np.where(counts, counts, counts.max())))
    most = int(np.argmax(counts))
    if counts[most] >= UNBALANCED * counts[least]:
        yield (
            f"unbalanced classes: {counts[most]:,} training rows of {labels[most]!r} and "
            f"{counts[least]:,} of {labels[least]!r}, {counts[most] / counts[least]:.0f}:1; "
            f"accuracy says little of {labels[least]!r}; see --class_weights balanced and "
            "--metric_for_best_model macro_f1"
        )
