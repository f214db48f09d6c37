"""Statistics of a few runs: their mean, and whether two sets of runs differ.

The runs of a recipe sample its seeds, and the rows sample the task. A statement about recipes has
to allow for both: runs x rows is a crossed design, like readers x cases in the assessment of
diagnostic tests, where the theory comes from.
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

LEVEL, POWER = 0.05, 0.8
NUM_RESAMPLES = 10_000

# Of each set. With two runs the estimated variance has one degree of freedom, and the test calls
# equal recipes different in up to 6% of the cases.
MIN_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Summary:
    """A figure over the runs of a set; a single run has no `standard_deviation`, no `interval`."""

    num_runs: int
    mean: float
    standard_deviation: float | None
    interval: tuple[float, float] | None


def summarize(
    values: Sequence[float],
    score_range: tuple[float, float] | None = None,
    rows_ratio: float = 0.0,
) -> Summary:
    """Mean, sample standard deviation, and the 95% t interval of the mean.

    The interval covers the mean over all seeds, on these rows. Source: Student (1908).

    Args:
        values: of a figure, one for each run.
        score_range: lowest and highest possible value, to which the interval is clipped.
        rows_ratio: as for `paired_difference`, whose runs are not independent either.
    """
    num_runs, mean = len(values), float(np.mean(values))
    if num_runs == 1:
        return Summary(1, mean, None, None)
    deviation = float(np.std(values, ddof=1))
    error = deviation * (1 / num_runs + rows_ratio) ** 0.5
    half = float(scipy.special.stdtrit(num_runs - 1, 1 - LEVEL / 2)) * error
    return Summary(num_runs, mean, deviation, _interval(mean, half, score_range))


def _interval(
    center: float, half: float, limits: tuple[float, float] | None
) -> tuple[float, float]:
    """`center` plus and minus `half`, clipped to `limits`."""
    low, high = center - half, center + half
    if limits:
        low, high = np.clip((low, high), *limits).tolist()
    return low, high


def standard_error_of_share(share: float, num_rows: int) -> float:
    """Standard error of a share of `num_rows` rows: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / num_rows)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Set A minus set B in the mean of a metric over runs.

    `detectable` is the least true difference that a share `POWER` of such comparisons would find:
    the standard error times the sum of two quantiles of t. Source: Bloom (1995), Evaluation Review
    19(5). If a set has fewer than `MIN_RUNS`, the interval covers these same models on other rows
    but not other seeds, and `distinguishable` is None.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    interval: tuple[float, float]
    detectable: float
    p_value: float
    distinguishable: bool | None


def difference_of_means(
    scores_a: Array,
    scores_b: Array,
    covariance: Array,
    score_range: tuple[float, float] | None = None,
    *,
    paired: bool = False,
) -> Difference:
    """Test whether two recipes differ in the expectation of a score, over seeds and rows.

    The variance of the difference of the means has three parts: the variance between the runs of
    A over their number, the same for B, and what the runs of a set share because all are scored on
    the same rows: cov_AA + cov_BB - 2 cov_AB, means of covariances of different runs over samples
    of rows. The scores give the first two, a bootstrap over rows the third; the degrees of freedom
    are Satterthwaite's. The variance between runs is at least what the rows alone cause (the
    variance of a run minus the covariance of two), since that of the seeds cannot be negative.
    Where run i of A and run i of B have a seed in common, the variance of their differences
    replaces the first two.

    Percentiles of resampled runs and rows (Owen, 2007) give intervals that are too narrow for so
    few runs: with three, a bootstrap sees two thirds of the variance and uses normal quantiles.

    Args:
        scores_a: (runs of A,), on all rows.
        scores_b: (runs of B,).
        covariance: (runs of A and B, runs of A and B) of the scores over samples of rows.
        score_range: lowest and highest possible score; the interval is clipped to the differences
            that they allow.
        paired: run i of both sets has the same seed.

    Source: Obuchowski and Rockette (1995), Communications in Statistics 24(2), with the readers
    crossed with the tests if paired, else nested in them; degrees of freedom as in Hillis (2007),
    Statistics in Medicine 26(3), if not paired with unequal variances as in Welch (1947),
    Biometrika 34(1-2).
    """
    num_a, num_b = len(scores_a), len(scores_b)
    difference = float(np.mean(scores_a) - np.mean(scores_b))
    if min(num_a, num_b) < MIN_RUNS:
        weights = np.repeat([1 / num_a, -1 / num_b], [num_a, num_b])
        variance, freedom = float(weights @ covariance @ weights), math.inf
    else:
        own_a, shared_a = _diagonal_and_rest(covariance[:num_a, :num_a])
        own_b, shared_b = _diagonal_and_rest(covariance[num_a:, num_a:])
        between = covariance[:num_a, num_a:]
        if paired:
            own_pair, shared = _diagonal_and_rest(between)
            groups = [
                (
                    scores_a - scores_b,
                    own_a + own_b - 2 * own_pair,
                    shared_a + shared_b - 2 * shared,
                )
            ]
            common = max(0.0, groups[0][2])
        else:
            groups = [(scores_a, own_a, shared_a), (scores_b, own_b, shared_b)]
            common = max(0.0, shared_a + shared_b - 2 * float(between.mean()))
        parts = [
            max(float(np.var(scores, ddof=1)), own - shared) / len(scores)
            for scores, own, shared in groups
        ]
        variance = sum(parts) + common
        spread = sum(
            part**2 / (len(scores) - 1) for part, (scores, *_) in zip(parts, groups, strict=True)
        )
        freedom = variance**2 / spread if spread else math.inf
    error = math.sqrt(max(0.0, variance))
    return _tested(difference, error, freedom, score_range, min(num_a, num_b))


def paired_difference(
    scores_a: Array,
    scores_b: Array,
    rows_ratio: float,
    score_range: tuple[float, float] | None = None,
) -> Difference:
    """Test whether two recipes differ, by pairs of runs that validate on the same rows.

    For runs whose validation rows were cut from the training rows, differently in each pair. Their
    training rows overlap, so that the variance of the mean is not that of independent pairs, s^2 /
    n, but about s^2 (1 / n + rows_ratio). There is no unbiased estimate of the variance of a
    cross-validation (Bengio and Grandvalet, 2004, JMLR 5).

    Args:
        scores_a: (pairs,), two at least.
        scores_b: (pairs,).
        rows_ratio: validation rows for each training row.
        score_range: as for `difference_of_means`.

    Source: the corrected resampled t-test of Nadeau and Bengio (2003), Machine Learning 52(3); for
    folds, Bouckaert and Frank (2004), PAKDD.
    """
    differences = np.asarray(scores_a) - np.asarray(scores_b)
    num_pairs = len(differences)
    error = float(np.std(differences, ddof=1)) * math.sqrt(1 / num_pairs + rows_ratio)
    mean = float(np.mean(differences))
    return _tested(mean, error, num_pairs - 1, score_range, num_pairs)


def _tested(
    difference: float,
    error: float,
    freedom: float,
    score_range: tuple[float, float] | None,
    num_runs: int,
) -> Difference:
    """The t test of a difference with this standard error and these degrees of freedom."""
    # With infinite degrees of freedom `stdtr` is the normal distribution.
    half = float(scipy.special.stdtrit(freedom, 1 - LEVEL / 2)) * error
    if error:
        p_value = 2 * float(scipy.special.stdtr(freedom, -abs(difference) / error))
    else:
        p_value = float(difference == 0)
    # A score less another of the same range.
    limits = score_range and (score_range[0] - score_range[1], score_range[1] - score_range[0])
    return Difference(
        difference,
        error,
        freedom,
        _interval(difference, half, limits),
        half + float(scipy.special.stdtrit(freedom, POWER)) * error,
        p_value,
        p_value < LEVEL if num_runs >= MIN_RUNS else None,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of several comparisons, so that at `LEVEL` any is wrong in 5% of cases.

    Source: Holm (1979), Scandinavian Journal of Statistics 6(2).
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1)
    return adjusted.tolist()


def _diagonal_and_rest(covariance: Array) -> tuple[float, float]:
    """Mean of the diagonal, of a run with itself or its partner, and mean of the rest."""
    num_runs = len(covariance)
    total, trace = float(covariance.sum()), float(np.trace(covariance))
    return trace / num_runs, (total - trace) / (num_runs * (num_runs - 1))


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
