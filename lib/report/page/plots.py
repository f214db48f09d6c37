"""Plots of a run: each function takes arrays and returns a Matplotlib `Figure`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from lib.training.curves import precision_recall_curve

Array = NDArray[Any]

# Inches: on a phone, text in the plots is as large as that of the page. LOW is for one curve.
WIDTH, HEIGHT, LOW = 4.8, 3.4, 2.3

# Distinct for color-blind readers too. Source: Okabe and Ito (2008), "Color universal design".
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#767676"

# More classes than these leave no room for their counts, their names, their curves.
MOST_COUNTS, MOST_NAMES, MOST_CURVES = 8, 30, len(COLORS)
LONGEST_NAME = 18


def learning_curve(
    updates: Sequence[float],
    losses: Sequence[float],
    eval_updates: Sequence[float],
    eval_losses: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    *,
    best_update: int,
    final: Mapping[str, tuple[float, float, float]],
) -> Figure:
    """Losses above, metrics below, and beside these the saved model's with their intervals.

    Args:
        updates, losses: of each logged update, the mean since the one before.
        eval_updates, eval_losses: of each evaluation, and `scores` each metric there.
        final: each metric of the saved model as (value, low, high).
    """
    figure = Figure((WIDTH, 1.6 * HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[4, 1])
    above = _plain(figure.add_subplot(grid[0, :]))
    below = _plain(figure.add_subplot(grid[1, 0]))
    beside = _plain(figure.add_subplot(grid[1, 1], sharey=below))

    above.plot(updates, losses, color=COLORS[0], label="training", **_marks(updates))
    above.plot(eval_updates, eval_losses, "o-", color=COLORS[1], markersize=4, label="validation")
    above.set_ylabel("loss")
    above.set_xlim(left=0)
    for color, (name, values) in zip(COLORS, scores.items(), strict=False):
        below.plot(eval_updates, values, "o-", color=color, markersize=4, label=_literal(name))
    for axes in (above, below):
        label = f"best, update {best_update}" if axes is above else None
        axes.axvline(best_update, color=GREY, linestyle="--", linewidth=1, label=label)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    below.set_xlim(above.get_xlim())
    above.legend(frameon=False, fontsize=9)
    below.set_ylabel("score")

    for position, (color, (value, low, high)) in enumerate(
        zip(COLORS, final.values(), strict=False)
    ):
        beside.plot([position, position], [low, high], color=color, linewidth=2)
        beside.plot([position], [value], "o", color=color, markersize=5)
    beside.set_xlim(-0.7, len(final) - 0.3)
    beside.set_xticks([])
    beside.set_xlabel("saved,\n95% interval", fontsize=9)
    beside.tick_params(labelleft=False)
    figure.legend(
        *below.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 if sum(map(len, scores)) <= 40 else 2,
        frameon=False,
        fontsize=9,
    )
    return figure


def learning_rate(updates: Sequence[float], rates: Sequence[float]) -> Figure:
    """The learning rate of each logged update."""
    figure, axes = _one(LOW)
    axes.plot(updates, rates, color=COLORS[0], **_marks(updates))
    axes.set(xlabel="update", ylabel="learning rate", xlim=(0, None), ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def throughput(updates: Sequence[float], examples_per_second: Sequence[float]) -> Figure:
    """Training examples per second of each logged update, and their median."""
    figure, axes = _one(LOW)
    axes.plot(updates, examples_per_second, color=COLORS[0], **_marks(updates))
    median = float(np.median(examples_per_second))
    axes.axhline(median, color=GREY, linestyle="--", linewidth=1, label=f"median {median:.1f}")
    axes.set(xlabel="update", ylabel="examples/s", xlim=(0, None))
    axes.set_ylim(0, 1.25 * max(examples_per_second))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def confusion_matrix(predictions: Array, labels: Array, names: Sequence[str]) -> Figure:
    """Rows of each label (down) predicted as each class (across); dark where many of a label are.

    Args:
        predictions, labels: (rows,) class numbers.
        names: of the classes.
    """
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _one()
    axes.grid(visible=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(names) <= MOST_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            words = f"{count}\n{share:.0%}" if len(names) <= 4 else f"{count}"
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, words, ha="center", va="center", color=color)
    axes.set(xlabel="prediction", ylabel="label")
    if len(names) <= MOST_NAMES:
        ticks = range(len(names))
        size = 10 if len(names) <= MOST_COUNTS else 6
        slanted = len(names) > 2
        axes.set_xticks(
            ticks,
            list(map(_name, names)),
            fontsize=size,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor" if slanted else None,
        )
        axes.set_yticks(
            ticks,
            list(map(_name, names)),
            fontsize=size,
            rotation=0 if slanted else 90,
            va="center",
        )
    return figure


def precision_recall(
    probabilities: Array, labels: Array, names: Sequence[str]
) -> tuple[Figure, dict[str, float]] | None:
    """The precision-recall curve of class 1 of two, or of each of more classes against the rest.

    A dot stands where the predictions themselves are. None if no class can be drawn, for it is
    the label of no row or of every row, or there are too many.

    Args:
        probabilities: (rows, classes).
        labels: (rows,) class numbers.

    Returns:
        The figure, and the average precision of each class drawn.
    """
    classes = [1] if len(names) == 2 else list(range(len(names)))
    drawn = [number for number in classes if 0 < np.mean(labels == number) < 1]
    if not drawn or len(drawn) > MOST_CURVES:
        return None
    figure, axes = _one()
    averages = {}
    predictions = probabilities.argmax(axis=1)
    for color, number in zip(COLORS, drawn, strict=False):
        truth, scores = labels == number, probabilities[:, number]
        precision, recall, average = precision_recall_curve(truth, scores)
        averages[names[number]] = average
        axes.plot(
            recall, precision, drawstyle="steps-post", color=color, label=_name(names[number])
        )
        predicted = predictions == number
        if predicted.any():
            hits = (predicted & truth).sum()
            axes.plot([hits / truth.sum()], [hits / predicted.sum()], "o", color=color)
    if len(drawn) == 1:
        share = np.mean(labels == drawn[0])
        axes.axhline(share, color=GREY, linestyle="--", linewidth=1, label="by chance")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    # Curves may run anywhere in the axes.
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure, averages


def calibration(confidences: Array, accuracies: Array, counts: Array, lowest: float) -> Figure:
    """Accuracy against confidence in each bin (above), and the rows of each bin (below).

    Args:
        confidences, accuracies, counts: of equally wide bins of [0, 1], as
            `curves.calibration_bins` gives them.
        lowest: the least confidence that there can be, 1 / classes.
    """
    figure = Figure((WIDTH, 1.2 * HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
    above, below = (_plain(figure.add_subplot(grid[row, 0])) for row in (0, 1))
    width = 1 / len(counts)
    middles = (np.arange(len(counts)) + 0.5) * width
    found = counts > 0
    above.bar(
        middles[found],
        accuracies[found],
        width=0.9 * width,
        color=COLORS[0],
        alpha=0.75,
        label="accuracy",
    )
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    above.plot(
        confidences[found],
        accuracies[found],
        "o",
        color=COLORS[1],
        label="at mean confidence",
        clip_on=False,
    )
    above.set(ylabel="accuracy", ylim=(0, 1.02))
    above.tick_params(labelbottom=False)
    # Bars may stand anywhere in the axes.
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    bars = below.bar(middles[found], counts[found], width=0.9 * width, color=GREY)
    below.bar_label(bars, fontsize=8, padding=1)
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="rows")
    below.set_ylim(0, 1.3 * counts.max())
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axes in (above, below):
        axes.set_xlim(np.floor(lowest / width + 1e-9) * width, 1)
    return figure


def score_scatter(predictions: Array, labels: Array) -> Figure:
    """Predicted against labeled scores, both (rows,), of a regression."""
    figure, axes = _one()
    axes.plot(labels, predictions, "o", color=COLORS[0], markersize=4, alpha=0.4)
    ends = [min(labels.min(), predictions.min()), max(labels.max(), predictions.max())]
    axes.plot(ends, ends, color="black", linestyle="--", linewidth=1.2, label="prediction = label")
    axes.set(xlabel="label", ylabel="prediction")
    figure.legend(loc="outside upper right", frameon=False, fontsize=9)
    return figure


def token_lengths(lengths: Array, max_length: int, padding: Mapping[str, float]) -> Figure:
    """How many rows have how many tokens (above), and the share of padding by way of batching.

    Args:
        lengths: tokens of each row.
        padding: from the way of batching to the fraction of tokens that is padding.
    """
    figure = Figure((WIDTH, 1.4 * HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[2, 1])
    above, below = (_plain(figure.add_subplot(grid[row, 0])) for row in (0, 1))
    longest = int(lengths.max())
    step = -(-longest // 40)
    above.hist(lengths, bins=range(0, longest + step + 1, step), color=COLORS[0])
    above.axvline(
        max_length, color=GREY, linestyle="--", linewidth=1, label=f"max_length {max_length}"
    )
    above.set(xlabel="tokens of a training row", ylabel="rows", xlim=(0, 1.03 * max_length))
    # Above the bars, of which the tallest may stand anywhere.
    above.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1))
    shares = list(padding.values())
    bars = below.barh(list(padding), shares, color=COLORS[: len(padding)], height=0.6)
    below.bar_label(bars, labels=[f"{share:.1%}" for share in shares], padding=3)
    below.invert_yaxis()
    below.grid(visible=False)
    below.set_xlim(0, max(1.2 * max(shares), 0.05))
    below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.set_xlabel("share of padding in the tokens of an epoch")
    return figure


def _one(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _marks(updates: Sequence[float]) -> dict[str, Any]:
    """A dot at each of few points; one alone would not show as a line."""
    return {"marker": "o", "markersize": 3} if len(updates) < 15 else {}


def _name(name: str) -> str:
    """A class's name as an axis can hold it."""
    return _literal(shorten_name(name))


def shorten_name(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _literal(text: str) -> str:
    """Text without formulas, which two dollars would enclose."""
    return text.replace("$", r"\$")
