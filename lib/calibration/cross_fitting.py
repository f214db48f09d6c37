"""Fit a threshold and a temperature, and score them on rows that they were not fitted on.

The rows are cut into folds. For the rows of each, both are fitted on the rows of the others: what
is scored is the procedure, not a value that has seen its own rows. The values that are kept are
fitted on all rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.calibration.temperature import fit_temperature, scaled
from lib.calibration.threshold import PLAIN, decide, fit_threshold
from lib.checkpoints.atomic import write_text
from lib.training import curves, metrics

Array = NDArray[Any]

NUM_FOLDS = 5
LEAST_ROWS = 4 * NUM_FOLDS
CONFIG_FILE, CONFIG_KEY = "config.json", "calibration"


def calibrate(logits: Array, labels: Array, names: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Fit a temperature and, for two classes, a threshold, and score both by cross-fitting.

    Args:
        logits: (rows, classes).
        labels: (rows,) class numbers.
        names: of the task's metrics.
        seed: of the folds and of the bootstrap.

    Returns:
        Empty for a regression or fewer than `LEAST_ROWS` rows. Else `num_rows`, and under
        `temperature` and `threshold` each: the fitted `value`, the lowest and highest of the
        `folds`, and `scores`, by metric: `plain`, `cross_fitted` and its interval `ci95`, the
        interval of the `difference_ci95` on the same resamples, and what the fitted value scores
        on its own rows (`own_rows`).
    """
    if logits.shape[1] < 2 or len(labels) < LEAST_ROWS:
        return {}
    folds = assign_folds(labels, seed=seed)
    result = {
        "num_rows": len(labels),
        "temperature": _temperature(logits, labels, folds, seed=seed),
    }
    if logits.shape[1] == 2:
        result["threshold"] = _threshold(logits, labels, folds, names, seed=seed)
    return result


def assign_folds(labels: Array, *, seed: int) -> Array:
    """(rows,) the fold of each row; each fold has its share of every class."""
    order = np.random.default_rng([seed, NUM_FOLDS]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), int)
    folds[order] = np.arange(len(labels)) % NUM_FOLDS
    return folds


def _fits(folds: Array, fit: Callable[[Array], float]) -> list[float]:
    """What `fit` makes of the rows outside of each fold."""
    return [fit(folds != fold) for fold in range(NUM_FOLDS)]


def _temperature(logits: Array, labels: Array, folds: Array, *, seed: int) -> dict[str, Any]:
    value = fit_temperature(logits, labels)
    fits = _fits(folds, lambda rows: fit_temperature(logits[rows], labels[rows]))
    compared = [logits, scaled(logits, np.array(fits)[folds]), scaled(logits, value)]
    losses = np.stack([metrics.row_losses(each, labels) for each in compared])
    gaps = np.stack([_gaps(each, labels) for each in compared])

    def scores(rows: Array) -> list[list[float]]:
        return [losses[:, rows].mean(axis=1).tolist(), _errors(gaps[:, :, rows])]

    generator = np.random.default_rng(seed)
    num_rows = len(labels)
    resampled = np.array(
        [scores(generator.integers(num_rows, size=num_rows)) for _ in range(metrics.NUM_RESAMPLES)]
    )
    whole = scores(np.arange(num_rows))
    found = {name: (whole[i], resampled[:, i]) for i, name in enumerate(("loss", "ece"))}
    return _summary(value, fits, found)


def _gaps(logits: Array, labels: Array) -> Array:
    """(2, rows): the bin of each row's confidence, and that confidence minus 1 if it is right."""
    probabilities = metrics.probabilities_of(logits)
    confidences = probabilities.max(axis=1)
    edges = np.linspace(0, 1, curves.NUM_CALIBRATION_BINS + 1)[1:-1]
    correct = probabilities.argmax(axis=1) == labels
    return np.stack([np.searchsorted(edges, confidences), confidences - correct])


def _errors(gaps: Array) -> list[float]:
    """The expected calibration error, as in `curves`, of each part of (parts, 2, rows)."""
    return [
        float(np.abs(np.bincount(bins.astype(int), weights=gap)).sum() / len(gap))
        for bins, gap in gaps
    ]


def _threshold(
    logits: Array, labels: Array, folds: Array, names: Sequence[str], *, seed: int
) -> dict[str, Any]:
    probabilities = metrics.probabilities_of(logits)[:, 1]
    value = fit_threshold(probabilities, labels, names)
    fits = _fits(folds, lambda rows: fit_threshold(probabilities[rows], labels[rows], names))
    compared = np.stack(
        [decide(probabilities, cut) for cut in (PLAIN, np.array(fits)[folds], value)]
    )
    whole = metrics.resampled_scores(names, compared, labels, np.ones((1, len(labels))))
    resampled = metrics.bootstrap_scores(names, compared, labels, seed=seed)
    return _summary(value, fits, {name: (whole[name][0], resampled[name]) for name in whole})


def _summary(
    value: float, fits: Sequence[float], found: Mapping[str, tuple[Sequence[float], Array]]
) -> dict[str, Any]:
    """What `calibrate` returns of one of the two.

    Args:
        found: by metric, the scores of plain, cross-fitted and fitted on the same rows, and
            (resamples, 3) of them.
    """

    def interval(values: Array) -> list[float]:
        return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]

    scores = {
        name: {
            "plain": float(plain),
            "cross_fitted": float(fitted),
            "ci95": interval(resampled[:, 1]),
            "difference_ci95": interval(resampled[:, 1] - resampled[:, 0]),
            "own_rows": float(own_rows),
        }
        for name, ((plain, fitted, own_rows), resampled) in found.items()
    }
    return {"value": value, "folds": [min(fits), max(fits)], "scores": scores}


def store(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Write the fitted values to the model's config.json, which only lib.predict reads.

    Raises:
        InputError: the file cannot be written.
    """
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CONFIG_KEY] = {
        name: calibration[name]["value"]
        for name in ("temperature", "threshold")
        if name in calibration
    }
    # As transformers writes it.
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
