"""The flags of the rows."""

import dataclasses
import functools

from lib.cli.flags.declaration import at_least, between, flag
from lib.data.tasks import TASKS

_data = functools.partial(flag, "data")


@dataclasses.dataclass(frozen=True, init=False)
class DataFlags:
    """Where the rows come from, and how they are read and padded."""

    demo: bool = _data(False, "Use the built-in corpus and tiny model: nothing to download.")
    task_name: str | None = _data(
        None, "GLUE task. Default: mrpc, unless you give files.", choices=tuple(TASKS)
    )
    dataset_name: str = _data(
        "nyu-mll/glue",
        "Dataset on the hub, or a folder with its files (train.csv, ...) or a saved DatasetDict.",
        metavar="NAME_OR_DIR",
        is_path=True,
        resume="free",
    )
    dataset_revision: str | None = _data(
        None, "Branch, tag or commit of the dataset on the hub.", resume="free"
    )
    train_file: tuple[str, ...] | None = _data(
        None,
        "Training rows: CSV, TSV, JSON Lines, JSON or Parquet; files, quoted globs or folders.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    validation_file: tuple[str, ...] | None = _data(
        None,
        "Validation rows, on which the best model is chosen.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    test_file: tuple[str, ...] | None = _data(
        None,
        "Rows to predict; labels are scored, but never used to choose.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    validation_share: float | None = _data(
        None,
        "Cut this share of the training rows for validation, the same of each class.",
        rule=between(0.001, 0.999, "it is a share of the training rows"),
    )
    folds: int | None = _data(
        None,
        "Cut the training rows into N parts for cross-validation; see --fold.",
        rule=at_least(2, "one part validates and the others train"),
    )
    fold: int | None = _data(
        None,
        "The part of --folds that validates, from 0 to N - 1.",
        rule=at_least(0, "parts are counted from 0"),
    )
    text_columns: tuple[str, ...] = _data(
        (),
        "One or two text columns. Default: those of the task (sentence1 sentence2).",
        metavar="COLUMN",
    )
    label_column: str = _data(
        "label",
        "Label column: integers or names for classes, decimals for scores.",
        metavar="COLUMN",
    )
    max_length: int = _data(
        128,
        "Truncate rows to this many tokens.",
        rule=at_least(4, "it counts tokens, special ones included"),
    )
    pad_to_max_length: bool = _data(
        False, "Pad to --max_length instead of the longest row of the micro-batch."
    )
    max_train_samples: int | None = _data(
        None, "Use only the first N training rows.", rule=at_least(1, "it counts rows")
    )
    max_eval_samples: int | None = _data(
        None, "Use only the first N validation rows.", rule=at_least(1, "it counts rows")
    )
    max_predict_samples: int | None = _data(
        None, "Use only the first N test rows.", rule=at_least(1, "it counts rows"), resume="free"
    )
    dataloader_num_workers: int = _data(
        0,
        "Worker processes that make batches, per training process.",
        rule=at_least(0, "0 makes batches in the training process"),
        resume="free",
    )
