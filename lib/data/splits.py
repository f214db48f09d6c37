"""The checked splits of a run: text and labels in Arrow, known by their content."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lib.data import checks
from lib.data.files.cache import cache_folder, written_whole
from lib.data.rows.holdout import Holdout, cut
from lib.data.rows.notices import file_notices
from lib.data.sources import RawSplit, read_splits
from lib.data.tasks import TASKS, Task, task_of_files
from lib.data.tokenizing import encode_rows, tokenizer_key
from lib.errors import InputError

# Rows that `Dataset.map` hands on and writes at once. A start reads where each row begins, which in
# larger batches lies on fewer pages of the mapped file.
ROWS_PER_BATCH = 10_000


@dataclasses.dataclass(frozen=True)
class Splits:
    """Checked rows: the task's text columns and `labels` (int64, or float64 for a score).

    `labels` of a test split that has none are `IGNORED`. `source` says where the rows came from.
    `held_out` are the positions of the validation rows among the rows that they were cut from, and
    `notices` what the user should know of the rows.
    """

    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    source: str
    held_out: NDArray[np.int64] | None = None
    notices: tuple[str, ...] = ()

    @property
    def all(self) -> dict[str, Dataset]:
        return {"train": self.train, **self.validation, **self.test}

    def first(self, train: int | None, validation: int | None, test: int | None) -> "Splits":
        """The first rows of each split, or all of them where the count is None."""

        def rows(split: Dataset, count: int | None) -> Dataset:
            return split if count is None else split.select(range(min(count, len(split))))

        return dataclasses.replace(
            self,
            train=rows(self.train, train),
            validation={name: rows(split, validation) for name, split in self.validation.items()},
            test={name: rows(split, test) for name, split in self.test.items()},
            held_out=None if self.held_out is None else self.held_out[:validation],
        )

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> "Splits":
        """Tokenize every row; the result stays in Arrow files, which later runs reuse."""
        columns = list(self.task.columns)
        return self.map(
            partial(encode_rows, tokenizer=tokenizer, columns=columns, max_length=max_length),
            batched=True,
            with_indices=True,
            remove_columns=columns,
            cache_key=tokenizer_key(tokenizer, max_length=max_length),
        )

    def map(self, function: Callable[..., Any], *, cache_key: str, **options: Any) -> "Splits":
        """`Dataset.map` on every split, cached by the content of its rows and `cache_key`.

        The first process of a machine that calls this writes, the others and later runs read; a
        file is moved into place once it is complete. By itself `Dataset.map` names its cache by a
        hash of `function`, which changes when a fast tokenizer has been used.

        Args:
            cache_key: tells this function from any other.
            options: as for `Dataset.map`.
        """

        def mapped(name: str, rows: Dataset) -> Dataset:
            key = hashlib.sha256(f"{cache_key} {content_digest(rows)}".encode()).hexdigest()[:16]
            folder = cache_folder() / "mapped" / key
            folder.mkdir(parents=True, exist_ok=True)
            return rows.map(
                function,
                cache_file_name=str(folder / f"{name}.arrow"),
                new_fingerprint=f"{key}-{name}",
                batch_size=ROWS_PER_BATCH,
                writer_batch_size=ROWS_PER_BATCH,
                **options,
            )

        return dataclasses.replace(
            self,
            train=mapped("train", self.train),
            validation={name: mapped(name, rows) for name, rows in self.validation.items()},
            test={name: mapped(name, rows) for name, rows in self.test.items()},
        )

    def fingerprint(self) -> str:
        """SHA-256 of the contents of all splits, in order; not of where they lie."""
        parts = [f"{name} {content_digest(rows)}" for name, rows in self.all.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_splits(
    source: str | Mapping[str, str | Sequence[str]],
    *,
    task_name: str | None,
    revision: str | None = None,
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    holdout: Holdout | None = None,
) -> Splits:
    """The checked splits of a GLUE task, or of files of the user's own.

    Args:
        source: as for `read_splits`: a data set, or the files of each of `train`, `validation` and,
            if there is one, `test`.
        task_name: a GLUE task whose columns, labels and metrics the rows have. None for files: the
            labels are then those of the training rows, sorted.
        text_columns: one or two, instead of those of the task.
        holdout: cuts the validation rows from the training rows.

    Raises:
        InputError: names the split or file, the row and the column of what cannot be used.
    """
    raw = read_splits(source, task_name, revision=revision)
    name = (
        source if isinstance(source, str) else ", ".join(str(part.place) for part in raw.values())
    )
    if "train" not in raw:
        raise _missing_split(name, "train", raw)
    task = _task(raw["train"], task_name, text_columns, label_column)
    notices = []
    if holdout:
        if task.validation[0] in raw:
            notices.append(f"{name}: its own validation split is not used, as {holdout} is given")
        raw = {split: part for split, part in raw.items() if split not in task.validation}
        task = dataclasses.replace(task, validation=("validation",))
    if not isinstance(source, str):
        task = dataclasses.replace(task, validation=("validation",), test=("test",))
    if not holdout and task.validation[0] not in raw:
        raise _missing_split(name, task.validation[0], raw)
    feature = raw["train"].rows.features.get(label_column)
    checked = {
        split: _checked(
            raw[split],
            task,
            label_column,
            test=split in task.test,
            by_number=task_name is not None or isinstance(feature, datasets.ClassLabel),
            # QQP has a few; an empty field of a CSV file is how a missing text is written.
            may_be_empty=isinstance(source, str),
        )
        for split in ("train", *task.validation, *task.test)
        if split in raw
    }
    if len(task.labels) == 1:
        raise InputError(
            f"{raw['train'].place}: every row has the label {task.labels[0]!r}; a classifier needs "
            "two"
        )
    for split in checked:
        notices += file_notices(raw[split].rows, raw[split].place, task.columns, label_column)
    positions = None
    if holdout:
        where = str(raw["train"].place)
        checked["train"], checked["validation"], positions = cut(checked["train"], where, holdout)
    return Splits(
        task,
        train=checked["train"],
        validation={split: checked[split] for split in task.validation if split in checked},
        test={split: checked[split] for split in task.test if split in checked},
        source=name,
        held_out=positions,
        notices=tuple(notices),
    )


def _missing_split(name: str, split: str, found: Mapping[str, RawSplit]) -> InputError:
    remedy = "" if split == "train" else "; --validation_share 0.1 cuts one from the training rows"
    return InputError(
        f"--dataset_name {name} has no {split} split (found: {', '.join(found)}){remedy}"
    )


def _task(
    train: RawSplit,
    task_name: str | None,
    text_columns: Sequence[str],
    label_column: str,
) -> Task:
    """The task of that name with the columns of these rows, or the one that they describe."""
    rows, where = train.rows, train.place
    checks.check_not_empty(rows, where)
    columns = tuple(text_columns) or (TASKS[task_name].columns if task_name else ())
    columns = columns or checks.guess_text_columns(rows, where, label_column)
    checks.check_column_names(rows, where, columns, label_column)
    if task_name is not None:
        return dataclasses.replace(TASKS[task_name], columns=columns)
    return task_of_files(columns, checks.class_names(rows, where, label_column))


def _checked(
    split: RawSplit,
    task: Task,
    label_column: str,
    *,
    test: bool,
    by_number: bool,
    may_be_empty: bool,
) -> Dataset:
    """The text columns and `labels` of `rows`, once nothing is missing in them."""
    rows, where = split.rows, split.place
    checks.check_not_empty(rows, where)
    checks.check_column_names(rows, where, task.columns, None if test else label_column)
    checks.check_texts(rows, where, task.columns, may_be_empty=may_be_empty)
    labels = checks.number_labels(
        rows, where, label_column, task.labels, test=test, by_number=by_number
    )
    # `datasets` would pickle the labels to name the result.
    digest = hashlib.sha256(f"{rows._fingerprint} {task.columns}".encode())
    for values in _values_as_bytes(labels):
        digest.update(values)
    return rows.select_columns(list(task.columns)).add_column(
        "labels", labels, new_fingerprint=digest.hexdigest()
    )


def content_digest(rows: Dataset) -> str:
    """SHA-256 of the names and values of the columns of checked rows.

    Cached under the fingerprint that `datasets` has of the rows, so that a later start reads no
    text.
    """
    cached = cache_folder() / "digests" / rows._fingerprint
    if cached.exists():
        return cached.read_text()
    digest = hashlib.sha256()
    for name in rows.column_names:
        digest.update(f"{name} {len(rows)}\n".encode())
        for values in _values_as_bytes(rows.data.column(name)):
            digest.update(values)
    with written_whole(cached) as new:
        new.write_text(digest.hexdigest())
    return digest.hexdigest()


def _values_as_bytes(column: pyarrow.ChunkedArray) -> Iterator[bytes | memoryview]:
    """The values of a column of numbers or texts, none missing, the same however it is chunked."""
    if pyarrow.types.is_primitive(column.type):
        for chunk in column.chunks:
            yield chunk.to_numpy().tobytes()
        return
    for chunk in column.chunks:
        yield pc.binary_length(chunk).to_numpy().astype(np.int64).tobytes()
    kind = np.int64 if pyarrow.types.is_large_string(column.type) else np.int32
    for chunk in column.chunks:
        _, offsets, texts = chunk.buffers()
        ends = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1]
        yield memoryview(texts or b"")[ends[0] : ends[-1]]
