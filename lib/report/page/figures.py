"""The plots of a page in their order, each with a title and a caption."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from lib.report.finished_run import FinishedRun
from lib.report.page import plots
from lib.training import metrics
from lib.training.curves import calibration_bins, expected_calibration_error


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the page, and what it says in words."""

    title: str
    figure: Figure
    caption: str


# By the name of their file: all that a page may have, so that those of another run can be removed.
NAMES = (
    "learning_curve",
    "confusion_matrix",
    "score_scatter",
    "calibration",
    "precision_recall",
    "learning_rate",
    "throughput",
    "token_lengths",
)


def draw(run: FinishedRun) -> dict[str, Plot]:
    """Draw what there is to show of a run, by the names of `NAMES` and in their order."""
    drawn = {"learning_curve": _learning_curve(run)}
    drawn |= _classification(run) if run.task.labels else {"score_scatter": _score_scatter(run)}
    if run.training["update"]:  # a run may stop early before its first logged update
        drawn |= {"learning_rate": _learning_rate(run), "throughput": _throughput(run)}
    drawn["token_lengths"] = _token_lengths(run)
    return drawn


def _learning_curve(run: FinishedRun) -> Plot:
    labels = [plots.shorten_name(label) for label in run.task.labels]
    names = {
        name: metrics.display_name(name, labels)
        for name in metrics.metric_names(run.task.metrics, run.task.others)
        if name != "loss"
    }
    final = {
        names[score.metric]: (score.value, *score.interval)
        for score in run.scores
        if score.split == run.split and score.metric in names and score.interval is not None
    }
    figure = plots.learning_curve(
        run.training["update"],
        run.training["loss"],
        run.evaluations["update"],
        run.evaluations["loss"],
        {shown: run.evaluations[name] for name, shown in names.items()},
        best_update=run.best_update,
        final=final,
    )
    caption = (
        "Loss and metrics by update; the training loss includes dropout. The saved model is of "
        f"update {run.best_update} of {run.num_updates}."
    )
    return Plot("Learning curve", figure, caption)


def _learning_rate(run: FinishedRun) -> Plot:
    rates = run.training["learning_rate"]
    return Plot(
        "Learning rate",
        plots.learning_rate(run.training["update"], rates),
        f"The highest logged learning rate is {max(rates):.3g}.",
    )


def _throughput(run: FinishedRun) -> Plot:
    speeds = run.training["examples_per_second"]
    return Plot(
        "Throughput",
        plots.throughput(run.training["update"], speeds),
        f"The median is {np.median(speeds):.1f} training rows per second, evaluations excluded.",
    )


def _token_lengths(run: FinishedRun) -> Plot:
    max_length, padding = run.config["max_length"], run.padding
    cut = int((run.lengths == max_length).sum())
    return Plot(
        "Token lengths and padding",
        plots.token_lengths(run.lengths, max_length, padding),
        f"The median training row has {np.median(run.lengths):.0f} tokens, the longest "
        f"{run.lengths.max()}; {cut:,} reach max_length, where rows are truncated. "
        f"{padding['this run']:.1%} of the tokens in this run's batches were padding. It would "
        f"have been {padding['plain dynamic']:.1%} with rows in file order, and "
        f"{padding['fixed length']:.1%} at a fixed length of {max_length}.",
    )


def _score_scatter(run: FinishedRun) -> Plot:
    error = np.mean(np.abs(run.predicted - run.labels))
    return Plot(
        "Predictions and labels",
        plots.score_scatter(run.predicted, run.labels),
        f"A dot per row. The mean absolute error is {error:.3f}.",
    )


def _classification(run: FinishedRun) -> dict[str, Plot]:
    """What the saved model predicts, and how sure it is."""
    predicted, labels, names = run.predicted, run.labels, run.task.labels
    classes = predicted.argmax(axis=1)
    num_wrong = int((classes != labels).sum())
    confidences, accuracies, counts = calibration_bins(predicted, labels)
    error = expected_calibration_error(confidences, accuracies, counts)
    drawn = {
        "confusion_matrix": Plot(
            "Confusion matrix",
            plots.confusion_matrix(classes, labels, names),
            f"{num_wrong:,} of {len(labels):,} rows are misclassified. Percentages are shares of "
            "the rows with that label.",
        ),
        "calibration": Plot(
            "Calibration",
            plots.calibration(confidences, accuracies, counts, 1 / len(names)),
            f"The expected calibration error is {error:.3f} over {len(counts)} bins. The mean "
            f"confidence is {predicted.max(axis=1).mean():.1%}, the accuracy "
            f"{1 - num_wrong / len(labels):.1%}.",
        ),
    }
    curves = plots.precision_recall(predicted, labels, names)
    if curves is not None:
        figure, averages = curves
        words = ", ".join(f"{value:.3f} for {name!r}" for name, value in averages.items())
        caption = f"The average precision is {words}. A dot is at the model's own predictions."
        drawn["precision_recall"] = Plot("Precision and recall", figure, caption)
    return drawn
