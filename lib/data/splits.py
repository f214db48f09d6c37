"""Raw splits (hub, local folder, files) -> checked splits -> tokenised splits."""

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
from transformers import PreTrainedTokenizerBase

from lib.data.tasks import IGNORED, TASKS, Task, task_of_files
from lib.errors import InputError
from lib.hub.reach import REMEDY

Row = dict[str, Any]
Rows: TypeAlias = datasets.Dataset


@dataclasses.dataclass(frozen=True)
class Splits:
    """Checked rows: the task's text columns (str) and `labels` (int, or float for a score).

    `labels` of a test split that has none are `IGNORED`. `source` says where the rows came from.
    """

    task: Task
    train: Rows
    validation: dict[str, Rows]
    test: dict[str, Rows]
    source: str

    @property
    def all(self) -> dict[str, Rows]:
        return {"train": self.train, **self.validation, **self.test}

    def first(self, *, train: int | None, validation: int | None, test: int | None) -> "Splits":
        """The first rows of each split, or all of them where the count is None."""

        def rows(split: Rows, count: int | None) -> Rows:
            return split if count is None else split.select(range(min(count, len(split))))

        return dataclasses.replace(
            self,
            train=rows(self.train, train),
            validation={name: rows(split, validation) for name, split in self.validation.items()},
            test={name: rows(split, test) for name, split in self.test.items()},
        )

    def fingerprint(self) -> str:
        """SHA-256 of the contents of all splits, in order."""
        digest = hashlib.sha256()
        for name, rows in self.all.items():
            digest.update(f"{name} {len(rows)}\n".encode())
            for batch in rows.iter(batch_size=1000):
                digest.update(json.dumps(batch, sort_keys=True).encode())
        return digest.hexdigest()


def load_dataset(
    dataset_name: str, task_name: str, *, revision: str | None = None
) -> datasets.DatasetDict:
    """The raw splits of a GLUE task, from a local folder or from the hub.

    Raises:
        InputError: neither a folder that holds them, nor in the cache, nor on a hub in reach.
    """
    folder = Path(dataset_name)
    if dataset_name == "demo":
        from lib.demo.corpus import corpus_folder, write_corpus

        folder = write_corpus(corpus_folder())
    if folder.is_dir():
        return _load_folder(folder)
    if dataset_name.startswith((".", "/", "~")):
        raise InputError(f"--dataset_name {dataset_name}: no such folder")
    try:
        return datasets.load_dataset(dataset_name, task_name, revision=revision)
    except (OSError, ValueError) as error:
        # Without a hub `datasets` raises ConnectionError, FileNotFoundError or ValueError,
        # depending on what is cached and on HF_HUB_OFFLINE.
        raise InputError(
            f"--dataset_name {dataset_name} ({task_name}) is neither cached nor to be had from the "
            f"hub: {_first_line(error)}; {REMEDY}"
        ) from error


def _load_folder(folder: Path) -> datasets.DatasetDict:
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        # train.parquet, or the hub's train-00000-of-00002.parquet
        files: dict[str, list[str]] = {}
        for path in sorted(folder.glob("*.parquet")):
            files.setdefault(path.stem.split("-")[0], []).append(str(path))
        if not files:
            raise InputError(
                f"--dataset_name {folder}: holds no Parquet file (train.parquet, "
                "validation.parquet, ...) and no saved DatasetDict"
            )
        return datasets.DatasetDict(
            {name: Rows.from_parquet(paths) for name, paths in files.items()}
        )
    except (OSError, pyarrow.ArrowInvalid, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset_name {folder} cannot be read: {_first_line(error)}") from error


def load_splits(task_name: str, dataset_name: str, *, revision: str | None = None) -> Splits:
    """The checked splits of a GLUE task.

    Raises:
        InputError: a split, a column or a label that the task needs is missing.
    """
    task = TASKS[task_name]
    raw = load_dataset(dataset_name, task_name, revision=revision)
    for split in ("train", task.validation[0]):
        if split not in raw:
            raise InputError(
                f"--dataset_name {dataset_name} has no {split} split (found: {', '.join(raw)})"
            )
    checked = {}
    for split in ("train", *task.validation, *task.test):
        if split in raw:
            where = f"{dataset_name}, split {split}"
            checked[split] = _checked(
                raw[split],
                where,
                task.columns,
                "label",
                task.labels,
                test=split in task.test,
                of_task=True,
                may_be_empty=True,  # QQP has a few
            )
    return _splits(task, checked, source=dataset_name)


def load_files(
    files: Mapping[str, str],
    *,
    task_name: str | None,
    text_columns: Sequence[str],
    label_column: str,
) -> Splits:
    """The checked splits of files of the user's own.

    Args:
        files: path of each of `train`, `validation` and, if there is one, `test`.
        task_name: a GLUE task whose columns, labels and metrics these rows have, or None: the
            labels are then those of the training rows, sorted.

    Raises:
        InputError: names the file, the row and the column of what cannot be used.
    """
    raw = {split: read_rows(Path(path)) for split, path in files.items()}
    columns = tuple(text_columns) or (TASKS[task_name].columns if task_name else ())
    columns = columns or _guess_columns(raw["train"], files["train"], label_column)
    if len({*columns, label_column}) <= len(columns):
        raise InputError(
            f"{files['train']}: the text columns ({', '.join(columns)}) and the label column "
            f"({label_column}) must be different ones: see --text_columns and --label_column"
        )
    if task_name:
        task = dataclasses.replace(TASKS[task_name], columns=columns)
    else:
        labels = _labels_of(raw["train"], files["train"], label_column)
        task = task_of_files(columns, labels)
    task = dataclasses.replace(task, validation=("validation",), test=("test",))
    checked = {
        split: _checked(
            rows,
            files[split],
            columns,
            label_column,
            task.labels,
            test=split == "test",
            of_task=task_name is not None
            or isinstance(raw["train"].features[label_column], datasets.ClassLabel),
            may_be_empty=False,  # an empty field of a CSV file is how a missing text is written
        )
        for split, rows in raw.items()
    }
    if len(task.labels) == 1:
        raise InputError(
            f"{files['train']}: every row has the label {task.labels[0]!r}; a classifier needs two"
        )
    return _splits(task, checked, source=", ".join(files.values()))


def _splits(task: Task, checked: dict[str, Rows], source: str) -> Splits:
    return Splits(
        task,
        train=checked["train"],
        validation={name: checked[name] for name in task.validation if name in checked},
        test={name: checked[name] for name in task.test if name in checked},
        source=source,
    )


# ------------------------------------------------------------------------------------- files


def read_rows(path: Path) -> Rows:
    """The rows of a CSV, TSV, JSON Lines, JSON or Parquet file; CSV and TSV values are text.

    TSV is read as GLUE writes it, without quoting.

    Raises:
        InputError: the contents are not what the file's name says, or there is no row.
    """
    try:
        rows = _READERS[path.suffix.lower()](path)
    except (UnicodeDecodeError, pyarrow.ArrowInvalid, csv.Error, json.JSONDecodeError) as error:
        kind = path.suffix[1:].upper()
        if isinstance(error, UnicodeDecodeError):
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            raise InputError(
                f"{path}, line {line}: invalid UTF-8 (byte {error.object[error.start]:#04x}); save "
                "the file as UTF-8"
            ) from error
        raise InputError(f"{path} is not the {kind} its name says: {_first_line(error)}") from error
    if isinstance(rows, list):
        names = list(dict.fromkeys(name for row in rows for name in row))
        rows = Rows.from_dict(
            {name: _column(path, name, [row.get(name) for row in rows]) for name in names}
        )
    if not len(rows):
        raise InputError(f"{path} holds no row: it needs one at least")
    return rows


def _column(path: Path, name: str, values: list[Any]) -> list[Any]:
    """The values of a column, which are of one type or missing, as Arrow takes them.

    Raises:
        InputError: text and numbers, say, in one column.
    """
    values = [None if isinstance(v, float) and math.isnan(v) else v for v in values]
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and kinds != {int, float}:
        first = next(value for value in values if value is not None)
        number, other = next(
            (number, value)
            for number, value in enumerate(values, start=1)
            if value is not None and type(value) is not type(first)
        )
        raise InputError(
            f"{path}, row {number}: {name} is {other!r}, and in the rows before {first!r}: a "
            "column holds values of one kind"
        )
    return values


def _read_csv(path: Path) -> list[Row]:
    # newline="" leaves line ends inside quotes to the csv module; utf-8-sig drops Excel's mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _read_delimited(path, csv.reader(file, strict=True))


def _read_tsv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _read_delimited(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_delimited(path: Path, reader: Iterable[list[str]]) -> list[Row]:
    lines = iter(reader)
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise InputError(f"{path} has two columns of one name: {', '.join(header)}")
    rows = []
    for number, values in enumerate(lines, start=1):
        if not values:
            continue  # a blank line
        if len(values) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(values)} values where the header has {len(header)} "
                f"({', '.join(header)})"
            )
        rows.append(dict(zip(header, values, strict=True)))
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected an object, got {line.strip()}")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
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
    return content


def _read_parquet(path: Path) -> Rows:
    return Rows(pyarrow.parquet.read_table(path))


_READERS: dict[str, Callable[[Path], list[Row] | Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# ------------------------------------------------------------------------------------ checks


def _guess_columns(rows: Rows, path: str, label_column: str) -> tuple[str, ...]:
    if {"sentence1", "sentence2"} <= set(rows.column_names):
        return ("sentence1", "sentence2")
    others = tuple(name for name in rows.column_names if name not in (label_column, "idx"))
    if len(others) in (1, 2):
        return others
    raise InputError(
        f"{path}: cannot tell the text columns (found: {', '.join(rows.column_names)}); name them "
        "with --text_columns"
    )


def _labels_of(rows: Rows, path: str, label_column: str) -> tuple[str, ...]:
    """Names of the classes, sorted (numbers by value); empty if the labels are scores."""
    if label_column not in rows.column_names:
        raise InputError(_missing(path, label_column, rows.column_names))
    feature = rows.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    given = [value for value in rows[label_column] if not _is_missing(value)]
    if any(isinstance(value, (list, dict)) for value in given):
        raise InputError(f"{path}: {label_column} must hold one label for each row")
    _check_kind(rows[label_column], f"{path}, row", label_column)
    values = set(given)
    if all(isinstance(value, bool) for value in values):
        return tuple(str(value) for value in sorted(values))
    if values and all(_is_int(value) for value in values):
        return tuple(str(number) for number in sorted({int(value) for value in values}))
    if values and all(_is_float(value) for value in values):
        if all(float(value).is_integer() for value in values):
            raise InputError(
                f"{path}: {label_column} holds whole numbers with a decimal point "
                f"({given[0]!r}): write them without for classes, or give --task_name stsb for "
                "scores"
            )
        return ()
    return tuple(sorted(str(value) for value in values))


def _check_kind(values: Iterable[Any], where: str, column: str) -> None:
    """See that labels are numbers or names, and not numbers with a slip among them.

    Raises:
        InputError: naming the first row whose label is of another kind than that of the first.
    """
    first = None
    for number, value in enumerate(values, start=1):
        if _is_missing(value):
            continue
        first = value if first is None else first
        if _is_float(value) != _is_float(first):
            raise InputError(
                f"{where} {number}: {column} is {value!r}, and in the rows before {first!r}: "
                "labels are all numbers or all names"
            )


def _checked(
    rows: Rows,
    where: str,
    columns: Sequence[str],
    label_column: str,
    labels: Sequence[str],
    *,
    test: bool,
    of_task: bool,
    may_be_empty: bool,
) -> Rows:
    """The text columns and `labels` of `rows`, once nothing is missing in them."""
    for name in (*columns, *(() if test else (label_column,))):
        if name not in rows.column_names:
            raise InputError(_missing(where, name, rows.column_names))
    if not len(rows):
        raise InputError(f"{where} holds no row: it needs one at least")
    content: dict[str, list[Any]] = {name: rows[name][:] for name in columns}
    for name, texts in content.items():
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str) or (_is_missing(text) and not may_be_empty):
                raise InputError(
                    f"{where}, row {number}: {name} must be text, found {_shown(text)}; complete "
                    "or remove the row"
                )
    given = rows[label_column][:] if label_column in rows.column_names else []
    # GLUE withholds the labels of its test splits as -1.
    if given and not (test and all(_is_float(value) and float(value) == -1 for value in given)):
        number_of = _label_numbers(rows.features[label_column], labels, of_task=of_task)
        content["labels"] = [
            number_of(value, f"{where}, row {number}", test)
            for number, value in enumerate(given, start=1)
        ]
    else:
        content["labels"] = [IGNORED] * len(rows)
    kind = "int64" if labels else "float64"
    features = {name: datasets.Value("string") for name in columns}
    features["labels"] = datasets.Value(kind)
    return Rows.from_dict(content, features=datasets.Features(features))


def _label_numbers(
    feature: Any, labels: Sequence[str], *, of_task: bool
) -> Callable[[Any, str, bool], int | float]:
    """A function of (value, where, test) that gives a label its number, or says what is wrong.

    Args:
        of_task: whether the names are a task's, which files may also have as numbers from 0.
    """
    # A column of class numbers already counts from 0, in the order of the names.
    numbered = isinstance(feature, datasets.ClassLabel)

    def number(value: Any, where: str, test: bool) -> int | float:
        if _is_missing(value):
            if test:
                return IGNORED
            raise InputError(f"{where}: label is missing; complete or remove the row")
        if not labels:
            if not _is_float(value):
                raise InputError(f"{where}: label must be a number, found {value!r}")
            return float(value)
        if str(value) in labels and not numbered:
            return labels.index(str(value))
        if (numbered or of_task) and _is_int(value) and 0 <= int(value) < len(labels):
            return int(value)
        raise InputError(
            f"{where}: unknown label {value!r}; known from the task or the training rows: "
            f"{', '.join(labels)}"
        )

    return number


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


def _missing(where: str, name: str, found: Sequence[str]) -> str:
    remedy = "--label_column" if name == "label" else "--text_columns"
    return f"{where}: no column {name} (found: {', '.join(found)}); name yours with {remedy}"


def _shown(value: Any) -> str:
    return "nothing" if value is None or value == "" else repr(value)


def _is_missing(value: Any) -> bool:
    """Whether a label or a text is not there: None, NaN, an empty field of CSV, or its `nan`."""
    if isinstance(value, str):
        return value == "" or value.lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


# -------------------------------------------------------------------------------- tokenising


def tokenise(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> Splits:
    """The same splits with what the model takes instead of text, and each row's number in `row`.

    Once per machine, and cached between runs under `HF_DATASETS_CACHE`: the first process that
    calls this writes, the others and later runs read. The name of the cache is a hash of the
    rows, the tokenizer and `max_length`, since that of `Dataset.map` itself changes when a fast
    tokenizer has been used.

    Rows are not padded here but when they are batched.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = (type(tokenizer).__name__, str(tokenizer.init_kwargs), max_length)
    key = hashlib.sha256(
        json.dumps([splits.fingerprint(), vocabulary, settings], default=str).encode()
    ).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "train_mrpc" / key
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[name] for name in splits.task.columns]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    def tokenised(name: str, rows: Rows) -> Rows:
        numbered = rows.add_column("row", range(len(rows)))
        return numbered.map(
            encode,
            batched=True,
            remove_columns=list(splits.task.columns),
            cache_file_name=str(folder / f"{name}.arrow"),
            new_fingerprint=f"{key}-{name}",
            desc=f"Tokenising {name}",
        )

    return dataclasses.replace(
        splits,
        train=tokenised("train", splits.train),
        validation={name: tokenised(name, rows) for name, rows in splits.validation.items()},
        test={name: tokenised(name, rows) for name, rows in splits.test.items()},
    )


def row_lengths(rows: Rows) -> list[int]:
    """Tokens of each tokenised row."""
    column = rows.data.column("input_ids")
    return [int(length) for length in pyarrow.compute.list_value_length(column).to_pylist()]


def model_columns(rows: Rows) -> list[str]:
    """The columns of tokenised rows that the model takes."""
    return [name for name in rows.column_names if name not in ("labels", "row")]
