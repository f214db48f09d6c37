"""What the page says first: the score, what it means, and every metric of every split."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.report.finished_run import FinishedRun
from lib.training.curves import scores_of_classes

Array = NDArray[Any]

# Of classes, in a sentence.
MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Headline:
    """The score that chose the model, in the pieces that the page sets in different sizes."""

    metric: str
    value: str
    interval: str
    rows: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.metric, self.value, self.interval, self.rows)))


@dataclasses.dataclass(frozen=True)
class Table:
    """A split and its scores, as (metric, value, interval)."""

    split: str
    num_rows: int
    scores: list[tuple[str, str, str]]


def headline(run: FinishedRun) -> Headline:
    """The metric that chose the saved model, on the split that it was chosen on."""
    score = next(
        score for score in run.scores if (score.split, score.metric) == (run.split, run.best_metric)
    )
    interval = ""
    if score.interval is not None:
        interval = f"(95% interval {score.interval[0]:.4f} to {score.interval[1]:.4f})"
    return Headline(
        run.metric_name(score.metric),
        f"{score.value:.4f}",
        interval,
        f"on {run.num_rows[run.split]:,} {run.split} rows",
    )


def choice(run: FinishedRun) -> str:
    """How the saved model was chosen, and what `combined_score` is."""
    words = (
        f"Best {run.metric_name(run.best_metric)} of the run, after update {run.best_update} of "
        f"{run.num_updates}."
    )
    if len(run.task.metrics) > 1:
        parts = " and ".join(map(run.metric_name, run.task.metrics))
        words += f" combined_score is the mean of {parts}."
    return words


def score_tables(run: FinishedRun) -> list[Table]:
    """Every metric of every split with labels."""
    return [
        Table(
            split,
            num_rows,
            [
                (
                    run.metric_name(score.metric),
                    f"{score.value:.4f}",
                    f"{score.interval[0]:.4f} to {score.interval[1]:.4f}" if score.interval else "",
                )
                for score in run.scores
                if score.split == split
            ],
        )
        for split, num_rows in run.num_rows.items()
    ]


def calibration_rows(run: FinishedRun) -> list[tuple[str, ...]]:
    """The scores of a fitted threshold and temperature, as cells of a table.

    What was fitted, metric, plain score, cross-fitted score, the interval of their difference, and
    the score on the rows of the fit.
    """
    rows = []
    for name in sorted({"threshold", "temperature"} & run.calibration.keys(), reverse=True):
        fitted = run.calibration[name]
        for metric, score in fitted["scores"].items():
            low, high = score["difference_ci95"]
            rows.append(
                (
                    f"{name} {fitted['value']:.3f}",
                    run.metric_name(metric),
                    *(f"{score[kind]:.4f}" for kind in ("plain", "cross_fitted")),
                    f"{low:+.4f} to {high:+.4f}",
                    f"{score['own_rows']:.4f}",
                )
            )
    return rows


def class_table(predicted: Array, labels: Array, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Name, precision, recall, F1 and rows of each class; none for a regression.

    Args: as `warning`.
    """
    if not names:
        return []
    found = scores_of_classes(predicted.argmax(axis=1), labels, names)
    return [
        (name, *(f"{of[key]:.4f}" for key in ("precision", "recall", "f1")), f"{of['rows']:,}")
        for name, of in found.items()
    ]


def warning(predicted: Array, labels: Array, names: Sequence[str]) -> str | None:
    """A sentence on a model that has collapsed or never predicts some label; None if it is fine.

    Args:
        predicted, labels: as `read_predictions` returns them.
        names: of the classes; empty for a regression.
    """
    if not names:
        if predicted.std() >= 0.01 * labels.std():
            return None
        return (
            "The model has collapsed to one score: its predictions hardly vary, so it has not "
            "learned to tell rows apart."
        )
    counts = np.bincount(predicted.argmax(axis=1), minlength=len(names))
    if np.count_nonzero(counts) == 1:
        only = names[int(counts.argmax())]
        return (
            f"The classifier has collapsed to one class: it predicts {only!r} "
            "for every row, so it has not learned to tell the classes apart."
        )
    missing = [names[number] for number in np.unique(labels) if counts[number] == 0]
    if missing:
        named = ", ".join(map(repr, missing[:MOST_NAMED]))
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        return f"Some labels are never predicted: {named}{more}."
    return None


def baseline(predicted: Array, labels: Array, names: Sequence[str]) -> str:
    """A sentence that sets the result beside one without a model. Args: as `warning`."""
    if not names:
        constant = np.abs(labels - np.median(labels)).mean()
        return (
            f"The mean absolute error is {np.abs(predicted - labels).mean():.3f}. Always "
            f"predicting the median label would give {constant:.3f}. Predictions range from "
            f"{_range(predicted)}, labels from {_range(labels)}."
        )
    labeled = np.bincount(labels, minlength=len(names))
    most = int(labeled.argmax())
    accuracy = np.mean(predicted.argmax(axis=1) == labels)
    return (
        f"{accuracy:.1%} of the rows are classified correctly. Always predicting {names[most]!r}, "
        f"the most frequent label, would give {labeled[most] / len(labels):.1%}."
    )


def _range(scores: Array) -> str:
    return f"{scores.min():.2f} to {scores.max():.2f}"
