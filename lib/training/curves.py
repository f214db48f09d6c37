"""The scores of each class, and how well probabilities rank and fit: ROC AUC, calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_CALIBRATION_BINS = 15


def centered_ranks(values: Array, counts: Array) -> Array:
    """(resamples, rows) ranks within each resample minus their mean; ties share the mean rank."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], distinct)
    sizes = np.add.reduceat(counts.take(order, axis=1), starts, axis=1)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2 - (counts[0].sum() + 1) / 2
    return np.where(np.isnan(values), np.nan, ranks.take(group, axis=1))


def roc_auc(probabilities: Array, references: Array, counts: Array) -> Array:
    """Area under the ROC curve: of class 1 or, of more than two, the mean of each against the rest.

    A class that no row has does not count; 0.5 if all rows have the same. The area is that of
    Mann and Whitney, from the ranks of the rows of the class.
    Source: Hanley and McNeil (1982), Radiology 143(1).

    Args:
        probabilities: (runs, rows, classes).
        references: (rows,) class numbers.
        counts: (resamples, rows), how often each row occurs in a resample.

    Returns:
        (resamples, runs).
    """
    classes = [1] if probabilities.shape[2] == 2 else np.unique(references)
    num_rows = counts.sum(axis=1)
    areas = np.zeros((len(counts), len(probabilities)))
    num_classes = np.zeros((len(counts), 1))
    for number in classes:
        labeled = counts * (references == number)
        num_labeled = labeled.sum(axis=1)
        num_pairs = num_labeled * (num_rows - num_labeled)
        num_classes[:, 0] += num_pairs > 0
        for run, scores in enumerate(probabilities[:, :, number]):
            ranks = np.einsum("kr,kr->k", labeled, centered_ranks(scores, counts))
            areas[:, run] += np.where(num_pairs > 0, 0.5 + ranks / np.maximum(num_pairs, 1), 0)
    return np.where(num_classes > 0, areas / np.maximum(num_classes, 1), 0.5)


def precision_recall_curve(truth: Array, scores: Array) -> tuple[Array, Array, float]:
    """Return precision and recall at each distinct score, and the average precision.

    As scikit-learn's functions of these names, whose import takes most of a second at the end of
    a run. The average is the sum of (R_n - R_{n-1}) P_n, without interpolation.

    Args:
        truth: (rows,), true for the class, of which there is at least one row.
        scores: (rows,), higher for the class.

    Returns:
        Arrays of (distinct scores + 1,), recall falling from 1 to 0, and the average.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of the rows with one score
    hits = np.cumsum(truth[order])[last]
    precision = np.append((hits / (last + 1))[::-1], 1.0)
    recall = np.append((hits / hits[-1])[::-1], 0.0)
    return precision, recall, float(-np.sum(np.diff(recall) * precision[:-1]))


def calibration_bins(
    probabilities: Array, labels: Array, *, num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[Array, Array, Array]:
    """Mean confidence, accuracy and number of rows in equally wide bins of confidence.

    Confidence is the probability of the predicted class. Bin m of M covers ((m - 1) / M, m / M];
    confidence and accuracy are NaN in an empty bin.
    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 2; 15 bins.

    Args:
        probabilities: (rows, classes).
        labels: (rows,) class numbers.

    Returns:
        Three arrays of (num_bins,).
    """
    confidences = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidences, side="left")
    counts = np.bincount(bins, minlength=num_bins)
    rows = np.where(counts > 0, counts, np.nan)
    confidence = np.bincount(bins, weights=confidences, minlength=num_bins) / rows
    accuracy = np.bincount(bins, weights=correct, minlength=num_bins) / rows
    return confidence, accuracy, counts


def expected_calibration_error(confidence: Array, accuracy: Array, counts: Array) -> float:
    """Mean gap between accuracy and confidence over the bins, weighted by their rows.

    Args: as `calibration_bins` returns them.

    Source: Guo et al. (2017), equation 3.
    """
    return float(np.nansum(counts * np.abs(accuracy - confidence)) / counts.sum())


def scores_of_classes(
    predictions: Array, labels: Array, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return `precision`, `recall`, `f1` and the number of labeled `rows` of each class, by name.

    As scikit-learn's `precision_recall_fscore_support` with `zero_division=0`.

    Args:
        predictions, labels: (rows,) class numbers.
    """
    predicted, labeled, hits = (
        np.bincount(numbers, minlength=len(names))
        for numbers in (predictions, labels, labels[predictions == labels])
    )
    return {
        name: {
            "precision": float(hits[number] / max(predicted[number], 1)),
            "recall": float(hits[number] / max(labeled[number], 1)),
            "f1": float(2 * hits[number] / max(predicted[number] + labeled[number], 1)),
            "rows": int(labeled[number]),
        }
        for number, name in enumerate(names)
    }
