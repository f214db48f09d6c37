"""The files under predictions/, and the scores of the predictions that they hold."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from lib.calibration.cross_fitting import calibrate, store
from lib.checkpoints.atomic import replacing, write_text, writing
from lib.data.tasks import Task
from lib.distributed.collectives import on_main_process
from lib.training.curves import scores_of_classes
from lib.training.evaluation import Predictions, predict, score
from lib.training.metrics import (
    answers_of,
    confidence_intervals,
    has_labels,
    other_metrics,
    predictions_of,
    probabilities_of,
)

FOLDER = "predictions"


def score_splits(
    folder: Path,
    model: nn.Module,
    loaders: Mapping[str, DataLoader[Any]],
    accelerator: Accelerator,
    task: Task,
    between_batches: Callable[[], None],
    seed: int,
) -> tuple[dict[str, Any], Predictions]:
    """Predict every split, write the predictions, and score the splits with labels.

    Args:
        loaders: prepared, by split.
        seed: of the bootstrap.

    Returns:
        The scores on the main process, as `write_split` returns them, prefixed by `eval_` or
        `test_` (`eval_mm_` and `test_mm_` for MNLI's mismatched rows), with what `calibrate` fits
        under `calibration`, and the predictions of the split that chooses the best model.

    Raises:
        InputError: on all processes, if the folder cannot be written.
    """
    scores: dict[str, Any] = {}
    predicted = {}
    for part, splits in (("eval", task.validation), ("test", task.test)):
        found = [split for split in splits if split in loaders]
        for prefix, split in zip((part, f"{part}_mm"), found, strict=False):
            predicted[split] = predict(model, loaders[split], accelerator, between_batches)
            write = partial(write_split, folder, split, predicted[split], task, seed=seed)
            written = on_main_process(accelerator, write) or {}
            scores |= {f"{prefix}_{name}": value for name, value in written.items()}
    chosen_on = predicted[task.validation[0]]
    if accelerator.is_main_process and task.labels:
        logits, labels = chosen_on.logits, chosen_on.labels
        calibration = calibrate(logits, labels, task.metrics, seed=seed)
        if calibration:
            store(folder, calibration)
            scores["calibration"] = calibration
    return scores, chosen_on


def write_split(
    folder: Path, split: str, predictions: Predictions, task: Task, *, seed: int
) -> dict[str, Any]:
    """Write the predictions of a split; return its scores with intervals, if it has labels.

    Returns:
        The task's metrics, `other_metrics` and `loss`, each metric's 95% interval as
        `<metric>_ci95`, `num_rows`, `classes` (as `scores_of_classes` returns it), and
        `collapsed_to` if every row is predicted as one class.

    Raises:
        InputError: the folder cannot be written.
    """
    target = folder / FOLDER
    with writing(target):
        target.mkdir(exist_ok=True)
    logits, labels = predictions.logits, predictions.labels
    write_predictions(target / f"{split}.jsonl", logits, labels, task.labels)
    if split in task.test and task.submissions:
        name = task.submissions[task.test.index(split)]
        answers = predictions_of(logits)
        write_submission(target / name, answers, task.labels, submits_names=task.submits_names)
    if not has_labels(labels):
        return {"num_rows": len(labels)}
    others, answers = other_metrics(task), predictions_of(logits)
    evaluated = score(predictions, task, others)
    intervals = confidence_intervals(task.metrics, answers, labels, seed=seed)
    for name in others:
        intervals |= confidence_intervals([name], answers_of(logits, name), labels, seed=seed)
    results: dict[str, Any] = dict(evaluated.scores)
    results |= {f"{name}_ci95": list(interval) for name, interval in intervals.items()}
    results["num_rows"] = len(labels)
    if task.labels:
        results["classes"] = scores_of_classes(answers, labels, task.labels)
    if evaluated.collapsed_to is not None:
        results["collapsed_to"] = evaluated.collapsed_to
    return results


def write_predictions(
    path: Path, logits: NDArray[Any], labels: NDArray[Any], names: Sequence[str]
) -> None:
    """Write a JSON line per row: index, prediction, class probabilities, and label if known.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression, whose prediction is the score.
        names: of the classes; empty for a regression.
    """
    predictions = predictions_of(logits)
    probabilities = probabilities_of(logits) if names else None
    labeled = has_labels(labels)

    def lines() -> Iterator[str]:
        for row, prediction in enumerate(predictions):
            line: dict[str, Any] = {"index": row}
            if probabilities is None:
                line["prediction"] = float(prediction)
            else:
                line["prediction"] = names[prediction]
                line["probabilities"] = dict(zip(names, probabilities[row].tolist(), strict=True))
            if labeled:
                line["label"] = names[int(labels[row])] if names else float(labels[row])
            yield json.dumps(line, ensure_ascii=False) + "\n"

    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(lines())


def read_predictions(path: Path, names: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read what `write_predictions` wrote of a split with labels.

    Returns:
        (rows, classes) probabilities and (rows,) class numbers; for a regression, whose `names`
        are empty, (rows,) predicted scores and (rows,) labels.
    """
    numbers = {name: number for number, name in enumerate(names)}

    def values() -> Iterator[list[float]]:
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                if names:
                    probabilities = line["probabilities"]
                    yield [*(probabilities[name] for name in names), numbers[line["label"]]]
                else:
                    yield [line["prediction"], line["label"]]

    # Streamed: as Python objects, a million lines would take a gigabyte.
    width = len(names) + 1 if names else 2
    table = np.fromiter(values(), dtype=np.dtype((np.float64, width)))
    if names:
        return table[:, :-1], table[:, -1].astype(int)
    return table[:, 0], table[:, 1]


def write_submission(
    path: Path, predictions: NDArray[Any], names: Sequence[str], *, submits_names: bool
) -> None:
    """Write the file that gluebenchmark.com takes: `index<TAB>prediction`, in row order.

    Args:
        predictions: (rows,) class numbers, or scores for a regression.
        names: of the classes; empty for a regression.
    """
    if not names:
        values = [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]  # STS-B's range
    elif submits_names:
        values = [names[number] for number in predictions]
    else:
        values = [str(number) for number in predictions]
    rows = (f"{index}\t{value}\n" for index, value in enumerate(values))
    write_text(path, "index\tprediction\n" + "".join(rows))
