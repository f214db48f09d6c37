"""What a few runs say of a recipe: the mean over runs, and whether two sets of runs differ.

Runs of one recipe are a sample of its seeds, and the rows a sample of the task. A statement about
recipes has to allow for both: runs x rows is a crossed design, as readers x cases is in the
assessment of diagnostic tests, where the theory comes from.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

from lib.training.metrics import bootstrap_scores

Array = NDArray[Any]

LEVEL = 0.05
NUM_RESAMPLES = 10_000

# With two runs the estimated variance has one degree of freedom, and where there is no difference
# the test says "different" in up to 6% of the cases.
FEWEST_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Summary:
    """A figure over the runs of a set; a single run has no `standard_deviation`, no `interval`."""

    num_runs: int
    mean: float
    standard_deviation: float | None
    interval: tuple[float, float] | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation, and the 95% t interval of the mean.

    The interval says where the mean over all seeds lies, on these rows. Source: Student (1908).
    """
    num_runs, mean = len(values), float(np.mean(values))
    if num_runs == 1:
        return Summary(1, mean, None, None)
    deviation = float(np.std(values, ddof=1))
    half = float(scipy.special.stdtrit(num_runs - 1, 1 - LEVEL / 2)) * deviation / num_runs**0.5
    return Summary(num_runs, mean, deviation, (mean - half, mean + half))


def standard_error_of_share(share: float, num_rows: int) -> float:
    """How far a share of `num_rows` rows lies from that of all rows: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / num_rows)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Set A minus set B in the mean of a metric over runs.

    With fewer than `FEWEST_RUNS` in a set the interval is that of these very models on other
    rows; it says nothing of other seeds, and `distinguishable` is None.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    interval: tuple[float, float]
    p_value: float
    distinguishable: bool | None


def compare(scores_a: Array, scores_b: Array, covariance: Array) -> Difference:
    """Whether two recipes differ in the expectation of a score, over seeds and rows.

    The variance of the difference of the means is that between the runs of A, over their number,
    the same for B, and what is common to the runs of a set, since all are scored on the same
    rows: cov_AA + cov_BB - 2 cov_AB, means of covariances of different runs over samples of rows.
    The first two are estimated from the scores, the last by a bootstrap over rows; its degrees of
    freedom are Satterthwaite's. The variance between runs is not taken to be less than what the
    rows alone make of it (the variance of a run minus the covariance of two): that of the seeds
    is not negative.

    Resampling the runs instead, and taking percentiles (Owen, 2007, with rows), has intervals too
    narrow for so few: of three runs a bootstrap sees two thirds of the variance, and normal
    quantiles.

    Args:
        scores_a: (runs of A,), on all rows.
        scores_b: (runs of B,).
        covariance: (runs of A and B, the same) of the scores over samples of rows.

    Source: Obuchowski and Rockette (1995), Communications in Statistics 24(2), with the readers
    nested in the tests; degrees of freedom as in Hillis (2007), Statistics in Medicine 26(3), of
    unequal variances as in Welch (1947), Biometrika 34(1-2).
    """
    num_a, num_b = len(scores_a), len(scores_b)
    difference = float(np.mean(scores_a) - np.mean(scores_b))
    if min(num_a, num_b) < FEWEST_RUNS:
        weights = np.repeat([1 / num_a, -1 / num_b], [num_a, num_b])
        variance, freedom = float(weights @ covariance @ weights), math.inf
    else:
        own_a, shared_a = _diagonal_and_rest(covariance[:num_a, :num_a])
        own_b, shared_b = _diagonal_and_rest(covariance[num_a:, num_a:])
        common = max(0.0, shared_a + shared_b - 2 * float(covariance[:num_a, num_a:].mean()))
        parts = [
            max(float(np.var(scores, ddof=1)), own - shared) / len(scores)
            for scores, own, shared in (
                (scores_a, own_a, shared_a),
                (scores_b, own_b, shared_b),
            )
        ]
        variance = sum(parts) + common
        spread = parts[0] ** 2 / (num_a - 1) + parts[1] ** 2 / (num_b - 1)
        freedom = variance**2 / spread if spread else math.inf
    error = math.sqrt(max(0.0, variance))
    # `stdtr` takes infinite degrees of freedom for the normal distribution.
    half = float(scipy.special.stdtrit(freedom, 1 - LEVEL / 2)) * error
    if error:
        p_value = 2 * float(scipy.special.stdtr(freedom, -abs(difference) / error))
    else:
        p_value = float(difference == 0)
    return Difference(
        difference,
        error,
        freedom,
        (difference - half, difference + half),
        p_value,
        p_value < LEVEL if min(num_a, num_b) >= FEWEST_RUNS else None,
    )


def _diagonal_and_rest(covariance: Array) -> tuple[float, float]:
    """Mean variance, and mean covariance of two different runs."""
    number = len(covariance)
    total, trace = float(covariance.sum()), float(np.trace(covariance))
    return trace / number, (total - trace) / (number * (number - 1))


def score_covariances(
    names: Sequence[str],
    predictions: Array,
    references: Array,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Array]:
    """Covariances of the scores of runs over samples of rows, by a bootstrap.

    Args:
        names: of metrics, as in `metrics.METRICS`.
        predictions: (runs, rows) class numbers, or scores for a regression.
        references: (rows,) labels.

    Returns:
        (runs, runs) for each metric, and for `combined_score` if there are several.
    """
    scores = bootstrap_scores(
        names, predictions, references, seed=seed, num_resamples=num_resamples
    )
    return {name: np.atleast_2d(np.cov(values, rowvar=False)) for name, values in scores.items()}
