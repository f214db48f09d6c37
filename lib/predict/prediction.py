"""From files, or a text, and the model of a finished run to predictions."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from accelerate import Accelerator
from numpy.typing import NDArray

from lib.backends.devices import precision
from lib.calibration.decision import Decision, read_decision
from lib.data.files.cache import content_hash
from lib.data.tasks import Task
from lib.data.tokenizing import tokenizer_key
from lib.distributed import collectives
from lib.distributed.process_group import process_group
from lib.errors import InputError
from lib.predict.finished_model import read_finished_model
from lib.predict.inputs import Rows, read_rows
from lib.predict.outputs import WRITERS, check_output, new_columns, with_predictions, write_tables
from lib.predict.windows import Windows, logits_function
from lib.report.predictions import write_submission
from lib.tracking.progress import quiet_libraries
from lib.training import metrics

Array = NDArray[Any]


def predict_files(
    folder: Path,
    files: Sequence[str],
    *,
    output: Path,
    submission: Path | None,
    overwrite: bool,
    batch_size: int | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    threshold: str | None,
    temperature: str | None,
    trust_remote_code: bool,
) -> None:
    """Predict the rows of files, write them to `output`, and print the scores of labeled ones.

    All processes call this. Arguments that are None have the values of the run.

    Raises:
        InputError: on all processes, for what cannot be read, predicted or written.
    """
    quiet_libraries()
    finished = read_finished_model(folder)
    task, config = finished.task, finished.config
    _check_paths(output, submission, task, overwrite=overwrite)
    decision = read_decision(folder, len(task.labels) or 1, threshold, temperature)
    read = partial(
        read_rows,
        files,
        text_columns=tuple(text_columns or task.columns),
        label_column=label_column or config["label_column"],
        label_names=task.labels,
        by_number=config["task_name"] is not None,
        new_columns=new_columns(task.labels),
    )
    load = partial(finished.load, trust_remote_code=trust_remote_code)
    with process_group(config["peer_timeout"]):
        accelerator = Accelerator()
        collectives.check_world(accelerator.num_processes)
        rows = collectives.main_processes_first(accelerator, read)
        model, tokenizer = collectives.on_all_processes(accelerator, load)
        settings = finished.batching(batch_size)
        identity = {
            "model": content_hash(*finished.files),
            "tokenizer": tokenizer_key(tokenizer, max_length=config["max_length"]),
            "rows": rows.name,
            "text_columns": list(rows.text_columns),
            "precision": precision(accelerator),
            "device": accelerator.device.type,
            **settings,
        }
        windows = Windows(output.with_name(f".{output.name}.unfinished"), len(rows))
        try:
            claim = partial(windows.claim, identity, overwrite=overwrite)
            missing = collectives.from_main_process(accelerator, claim)
            logits_of = logits_function(model, tokenizer, accelerator, **settings)
            work = partial(windows.predict, missing, rows.texts, logits_of, accelerator)
            collectives.on_all_processes(accelerator, work)
            finish = partial(
                _finish, output, submission, windows, rows, decision, task, config["seed"]
            )
            collectives.on_main_process(accelerator, finish)
        finally:
            windows.lock.release()
        accelerator.end_training()


def predict_text(
    folder: Path,
    texts: Sequence[str],
    *,
    threshold: str | None,
    temperature: str | None,
    trust_remote_code: bool,
) -> str:
    """Return the prediction of one text or pair as a JSON object.

    Raises:
        InputError: the model takes a pair and got one text, or the reverse, or is none.
    """
    quiet_libraries()
    finished = read_finished_model(folder)
    columns = finished.task.columns
    if len(texts) != len(columns):
        wanted = "--text and --text_pair" if len(columns) == 2 else "--text alone"
        raise InputError(f"{folder} was trained on {' and '.join(columns)}: give {wanted}")
    num_classes = len(finished.task.labels) or 1
    decision = read_decision(folder, num_classes, threshold, temperature)
    model, tokenizer = finished.load(trust_remote_code=trust_remote_code)
    logits_of = logits_function(model, tokenizer, Accelerator(), **finished.batching(1))
    pair = {name: [text] for name, text in zip(columns, texts, strict=True)}
    predicted = _predicted(pyarrow.table(pair), logits_of(pair), decision, finished.task)
    return json.dumps(predicted.to_pylist()[0], ensure_ascii=False)


def _check_paths(output: Path, submission: Path | None, task: Task, *, overwrite: bool) -> None:
    check_output("--output", output, overwrite=overwrite)
    if output.suffix not in WRITERS:
        raise InputError(
            f"--output {output}: its extension does not name a format; known: {', '.join(WRITERS)}"
        )
    if submission is not None:
        if not task.submissions:
            raise InputError("--submission: gluebenchmark.com takes none for the task of this run")
        check_output("--submission", submission, overwrite=overwrite)


def _predicted(rows: pyarrow.Table, logits: Array, decision: Decision, task: Task) -> pyarrow.Table:
    answers, probabilities = decision.decide(logits)
    return with_predictions(rows, answers, probabilities, task.labels)


def _finish(
    output: Path,
    submission: Path | None,
    windows: Windows,
    rows: Rows,
    decision: Decision,
    task: Task,
    seed: int,
) -> None:
    """Write what was asked for, print the scores, and remove the windows."""

    def tables() -> Iterator[pyarrow.Table]:
        for start, logits in windows:
            yield _predicted(rows.window(start, len(logits)), logits, decision, task)

    write_tables(output, tables())
    if submission is not None or metrics.has_labels(rows.labels):
        logits = np.concatenate([logits for _, logits in windows])
        if submission is not None:
            answers, _ = decision.decide(logits)
            write_submission(submission, answers, task.labels, submits_names=task.submits_names)
        if metrics.has_labels(rows.labels):
            print("\n".join(_score_lines(logits, rows.labels, decision, task, seed)))
    windows.remove()
    print(f"{len(rows):,} rows: {output}")


def _score_lines(
    logits: Array, labels: Array, decision: Decision, task: Task, seed: int
) -> Iterator[str]:
    """Yield a line for each metric, with its 95% interval."""
    answers, _ = decision.decide(logits)
    scores = metrics.compute(task.metrics, answers, labels)
    intervals = metrics.confidence_intervals(task.metrics, answers, labels, seed=seed)
    for name, value in scores.items():
        low, high = intervals[name]
        yield f"{metrics.display_name(name, task.labels):<24}{value:.4f}  ({low:.4f} to {high:.4f})"
    yield f"{'loss':<24}{metrics.mean_loss(decision.scaled(logits), labels):.4f}"
