"""GLUE's metrics as an `evaluate.Metric` of this project, and their confidence intervals.

`evaluate.load("glue", ...)` would download a script and execute it; this downloads nothing.
"""

import tempfile
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics
from numpy.typing import NDArray

from lib.data.tasks import IGNORED

if TYPE_CHECKING:
    import evaluate

Array = NDArray[Any]

NUM_RESAMPLES = 1000
NUM_CALIBRATION_BINS = 15


def _f1(predictions: Array, references: Array) -> float:
    """F1 of class 1; 0 where nothing is predicted or labelled so."""
    return float(sklearn.metrics.f1_score(references, predictions, zero_division=0))


def _correlation(function: Any) -> Any:
    def correlation(predictions: Array, references: Array) -> float:
        """0 for a constant, whose correlation is not defined."""
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return 0.0
        return float(function(predictions, references).statistic)

    return correlation


def _matthews(predictions: Array, references: Array) -> float:
    """0 where one of them is constant, as scikit-learn has it."""
    with warnings.catch_warnings():
        # One for each of a thousand resamples whose rows are all of one class.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(sklearn.metrics.matthews_corrcoef(references, predictions))


# Names as in the GLUE metric of `evaluate`.
METRICS = {
    "accuracy": lambda predictions, references: float(np.mean(predictions == references)),
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearmanr": _correlation(scipy.stats.spearmanr),
}


def compute(names: Sequence[str], predictions: Array, references: Array) -> dict[str, float]:
    """Each metric, and their mean as `combined_score` if there are several (GLUE's own score).

    Args:
        predictions: (rows,) class numbers, or scores for a regression.
        references: (rows,) labels.
    """
    scores = {name: METRICS[name](predictions, references) for name in names}
    if len(scores) > 1:
        scores["combined_score"] = sum(scores.values()) / len(scores)
    return scores


def glue_metric(names: Sequence[str], *, regression: bool) -> "evaluate.Metric":
    """The metrics of a task as one `evaluate.Metric`, which computes in memory."""
    # 7 s: evaluate imports transformers' pipelines. Only the main process computes metrics.
    import datasets
    import evaluate

    kind = datasets.Value("float32" if regression else "int64")

    class GlueMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=f"{', '.join(names)}, computed by scikit-learn and SciPy",
                citation="",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
            return compute(names, np.asarray(predictions), np.asarray(references))

    # It makes its cache folder even so, and a home need not be writable.
    return GlueMetric(keep_in_memory=True, cache_dir=tempfile.gettempdir())


def metric_names(names: Sequence[str]) -> list[str]:
    """What an evaluation of a task measures."""
    return [*names, *(["combined_score"] if len(names) > 1 else []), "loss"]


def display_name(name: str, labels: Sequence[str]) -> str:
    """A metric as people should read it: F1 says of which class it is.

    Args:
        labels: names of the classes in the order of their numbers; empty for a regression.
    """
    return f"f1 of {labels[1]!r}" if name == "f1" else name


def best_metric_name(names: Sequence[str]) -> str:
    """The metric that GLUE scores a task by."""
    return "combined_score" if len(names) > 1 else names[0]


def confidence_intervals(
    names: Sequence[str],
    predictions: Array,
    references: Array,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap intervals over the rows.

    They say what another sample of validation rows might have given, not another training run.
    Source: Efron and Tibshirani (1993), chapter 13.
    """
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(num_resamples):
        rows = generator.integers(len(references), size=len(references))
        scores.append(compute(names, predictions[rows], references[rows]))
    return {
        name: tuple(np.percentile([score[name] for score in scores], [2.5, 97.5]).tolist())
        for name in scores[0]
    }


def predictions_of(logits: Array) -> Array:
    """(rows,) class numbers of (rows, classes) logits, or the scores of (rows, 1)."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def probabilities_of(logits: Array) -> Array:
    """(rows, classes) probabilities."""
    return np.asarray(scipy.special.softmax(logits.astype(np.float64), axis=1))


def calibration_bins(
    probabilities: Array, labels: Array, *, num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[Array, Array, Array]:
    """Mean confidence, accuracy and number of rows in equally wide bins of confidence.

    Confidence is the probability of the predicted class. Bin m of M takes ((m - 1) / M, m / M];
    the first two are NaN where it is empty.
    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 2, and its 15.

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
    """Mean distance of accuracy and confidence, over the bins of `calibration_bins` by their rows.

    Source: Guo et al. (2017), equation 3.
    """
    return float(np.nansum(counts * np.abs(accuracy - confidence)) / counts.sum())


def row_losses(logits: Array, labels: Array) -> Array:
    """Cross-entropy of each row, or the squared error of (rows, 1) logits; float64 of (rows,)."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        return np.asarray((logits[:, 0] - labels) ** 2)
    log_probabilities = scipy.special.log_softmax(logits, axis=1)
    return np.asarray(-log_probabilities[np.arange(len(labels)), labels.astype(int)])


def mean_loss(logits: Array, labels: Array) -> float:
    """The mean of `row_losses`."""
    return float(row_losses(logits, labels).mean())


def collapsed_class(predictions: Array) -> int | None:
    """The one class that a classifier predicts for everything, or None."""
    return int(predictions[0]) if np.ptp(predictions) == 0 else None


def has_labels(labels: Array) -> bool:
    """Whether the rows are labelled; those of GLUE's test splits are not."""
    return bool((labels != IGNORED).all())
