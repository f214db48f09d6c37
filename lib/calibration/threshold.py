"""The threshold of two classes: where the probability of the second becomes the prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.training.metrics import best_metric_name, resampled_scores

Array = NDArray[Any]

PLAIN = 0.5


def decide(probabilities: Array, threshold: float | Array) -> Array:
    """(rows,) class numbers: 1 where the probability of class 1 exceeds the threshold."""
    return (probabilities > threshold).astype(int)


def fit_threshold(probabilities: Array, labels: Array, names: Sequence[str]) -> float:
    """The threshold with the best score; of several, the one closest to 0.5.

    Candidates are 0.5 and the middles between neighboring probabilities.

    Args:
        probabilities: (rows,) of class 1.
        labels: (rows,) class numbers.
        names: of the task's metrics, the mean of which is maximized.
    """
    order = np.argsort(probabilities, kind="stable")
    sorted_probabilities = probabilities[order]
    middles = (sorted_probabilities[1:] + sorted_probabilities[:-1]) / 2
    candidates = np.append(middles[np.diff(sorted_probabilities) > 0], PLAIN)
    # The confusion matrix of each candidate, as how often each of four rows occurs.
    below = np.searchsorted(sorted_probabilities, candidates, side="right")
    positives_below = np.append(0, np.cumsum(labels[order]))[below]
    positives = labels.sum()
    counts = np.stack(
        [
            below - positives_below,
            positives_below,
            len(labels) - positives - (below - positives_below),
            positives - positives_below,
        ],
        axis=1,
    )
    predictions, references = np.array([[0, 0, 1, 1]]), np.array([0, 1, 0, 1])
    scores = resampled_scores(names, predictions, references, counts)[best_metric_name(names)]
    # Rounded: scores that differ in their last bits are equal.
    best = candidates[np.round(scores[:, 0], 12) == np.round(scores.max(), 12)]
    return float(best[np.argmin(np.abs(best - PLAIN))])
