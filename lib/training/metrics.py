"""GLUE's metrics as an `evaluate.Metric` of this project, and their confidence intervals.

The metrics are computed for many runs and many samples of rows at once; one run on all rows is a
special case. `evaluate.load("glue", ...)` would download a script and execute it.
"""

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lib.data.tasks import IGNORED, Task
from lib.errors import InputError
from lib.training.curves import centered_ranks, roc_auc

if TYPE_CHECKING:
    import evaluate

    from lib.data.splits import Splits

Array = NDArray[Any]

NUM_RESAMPLES = 1000

# The evaluators of `evaluate` import these if they can; no metric needs them.
EVALUATOR_IMPORTS = ("transformers.pipelines", "scipy.stats")

# Resamples x rows that are scored at a time. These fit into the processor's cache, which is
# several times faster than scoring all at once.
CHUNK_SIZE = 250_000


def _accuracy(predictions: Array, references: Array, counts: Array) -> Array:
    correct = counts @ (predictions == references).T
    return np.asarray(correct / counts.sum(axis=1, keepdims=True))


def _f1(predictions: Array, references: Array, counts: Array) -> Array:
    """F1 of class 1; 0 if no row is predicted or labeled as class 1."""
    return _ratio(*_f1_fraction(predictions == 1, references == 1, counts))


def _f1_fraction(predicted: Array, labeled: Array, counts: Array) -> tuple[Array, Array]:
    """Twice the true positives, and the rows predicted plus the rows labeled as a class."""
    true_positives = counts @ (predicted & labeled).T
    return 2 * true_positives, counts @ predicted.T + (counts @ labeled)[:, None]


def _macro_f1(predictions: Array, references: Array, counts: Array) -> Array:
    """Mean F1 of the classes that some row is predicted or labeled as."""
    fractions = [
        _f1_fraction(predictions == number, references == number, counts)
        for number in np.union1d(predictions, references)
    ]
    num_classes = np.sum([rows > 0 for _, rows in fractions], axis=0)
    return np.asarray(np.sum([_ratio(*fraction) for fraction in fractions], axis=0) / num_classes)


def _balanced_accuracy(predictions: Array, references: Array, counts: Array) -> Array:
    """Mean recall of the classes that rows have."""
    classes = np.unique(references)
    labeled = np.stack([counts @ (references == number) for number in classes])[..., None]
    correct = np.stack(
        [counts @ ((predictions == number) & (references == number)).T for number in classes]
    )
    recalls = _ratio(correct, np.broadcast_to(labeled, correct.shape))
    return np.asarray(recalls.sum(axis=0) / (labeled > 0).sum(axis=0))


def _matthews(predictions: Array, references: Array, counts: Array) -> Array:
    """Matthews' correlation of two or more classes; 0 if all predictions or labels are the same.

    Source: Gorodkin (2004), Computational Biology and Chemistry 28(5-6), as in scikit-learn.
    """
    num_rows = counts.sum(axis=1, keepdims=True)
    correct = counts @ (predictions == references).T
    products: Array | float = 0.0
    squares_predicted: Array | float = 0.0
    squares_labeled: Array | float = 0.0
    for number in np.union1d(predictions, references):
        predicted = counts @ (predictions == number).T
        labeled = counts @ (references == number)[:, None]
        products += predicted * labeled
        squares_predicted += predicted**2
        squares_labeled += labeled**2
    return _ratio(
        correct * num_rows - products,
        np.sqrt((num_rows**2 - squares_predicted) * (num_rows**2 - squares_labeled)),
    )


def _pearson(predictions: Array, references: Array, counts: Array) -> Array:
    """Pearson's correlation; 0 if all predictions or labels are the same."""
    predictions, references = predictions.astype(np.float64), references.astype(np.float64)
    weights = counts / counts.sum(axis=1, keepdims=True)
    x = (predictions - predictions.mean(axis=1, keepdims=True)).T
    y = (references - references.mean())[:, None]
    mean_x, mean_y = weights @ x, weights @ y
    variances = _variance(weights @ x**2, mean_x) * _variance(weights @ y**2, mean_y)
    return _ratio(weights @ (x * y) - mean_x * mean_y, np.sqrt(variances))


def _variance(mean_of_squares: Array, mean: Array) -> Array:
    """Variance from its moments; exactly 0 for a constant, where rounding errors would be left."""
    variance = mean_of_squares - mean**2
    return np.where(variance <= 1e-12 * mean_of_squares, 0.0, variance)


def _spearman(predictions: Array, references: Array, counts: Array) -> Array:
    """Spearman's correlation; 0 if all predictions or labels are the same."""

    def product(a: Array, b: Array) -> Array:
        return np.asarray(np.einsum("kr,kr->k", a, b))

    labels = centered_ranks(references, counts)
    weighted_labels = counts * labels
    squares_of_labels = product(weighted_labels, labels)
    columns = []
    for run in predictions:
        ranks = centered_ranks(run, counts)
        squares = squares_of_labels * product(counts * ranks, ranks)
        columns.append(_ratio(product(weighted_labels, ranks), np.sqrt(squares)))
    return np.stack(columns, axis=1)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


# Names as in the GLUE metric of `evaluate` and in scikit-learn; arguments and result as in
# `resampled_scores`. `roc_auc` takes probabilities instead of predictions.
METRICS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "balanced_accuracy": _balanced_accuracy,
    "roc_auc": roc_auc,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
# What a run reports of every classifier, beside the metrics of its task.
OF_CLASSIFIERS = ("macro_f1", "balanced_accuracy", "roc_auc")
CORRELATIONS = {"matthews_correlation", "pearson", "spearmanr"}  # from -1 to 1, the others from 0


def resampled_scores(
    names: Sequence[str], predictions: Array, references: Array, counts: Array
) -> dict[str, Array]:
    """Score runs on resamples: each metric, and their mean as `combined_score` if several.

    Args:
        predictions: (runs, rows) class numbers, or scores for a regression; for `roc_auc`
            (runs, rows, classes) probabilities.
        references: (rows,) labels.
        counts: (resamples, rows), how often each row occurs in a resample; each resample has the
            same number of rows.

    Returns:
        (resamples, runs) for each metric.
    """
    # Matrix products run in BLAS for floats only.
    counts = counts.astype(np.float64)
    scores = {name: METRICS[name](predictions, references, counts) for name in names}
    if len(scores) > 1:
        scores["combined_score"] = np.asarray(sum(scores.values()) / len(scores))
    return scores


def compute(names: Sequence[str], predictions: Array, references: Array) -> dict[str, float]:
    """Score one run: each metric, and their mean as `combined_score` if several (GLUE's own score).

    Args:
        predictions: (rows,) class numbers, or scores for a regression.
        references: (rows,) labels.
    """
    counts = np.ones((1, len(references)))
    scores = resampled_scores(names, predictions[None], references, counts)
    return {name: float(values[0, 0]) for name, values in scores.items()}


def bootstrap_scores(
    names: Sequence[str],
    predictions: Array,
    references: Array,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Array]:
    """Score runs on rows drawn with replacement; a resample takes the same rows of all runs.

    Args:
        predictions: (runs, rows) class numbers, or scores for a regression.
        references: (rows,) labels.

    Returns:
        (resamples, runs) for each metric, and for `combined_score` if there are several.
    """
    num_rows = len(references)
    chunk_size = max(1, CHUNK_SIZE // num_rows)
    generator = np.random.default_rng(seed)
    chunks = []
    for first in range(0, num_resamples, chunk_size):
        size = min(chunk_size, num_resamples - first)
        rows = generator.integers(num_rows, size=(size, num_rows))
        rows += num_rows * np.arange(size)[:, None]
        counts = np.bincount(rows.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        chunks.append(resampled_scores(names, predictions, references, counts))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def confidence_intervals(
    names: Sequence[str],
    predictions: Array,
    references: Array,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap intervals over the rows, for each score of `compute`.

    They cover other samples of validation rows, not other training runs.
    Source: Efron and Tibshirani (1993), chapter 13.
    """
    scores = bootstrap_scores(
        names, predictions[None], references, seed=seed, num_resamples=num_resamples
    )
    return {
        name: tuple(np.percentile(values, [2.5, 97.5]).tolist()) for name, values in scores.items()
    }


def glue_metric(names: Sequence[str], *, regression: bool) -> "evaluate.Metric":
    """The metrics of a task as one `evaluate.Metric`, which computes in memory."""
    import datasets

    _preload_evaluate()
    import evaluate

    kind = datasets.Value("float32" if regression else "int64")

    class GlueMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=f"{', '.join(names)}, as in scikit-learn and SciPy",
                citation="",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
            return compute(names, np.asarray(predictions), np.asarray(references))

    # The metric creates its cache folder even in memory, and the home may be read-only.
    return GlueMetric(keep_in_memory=True, cache_dir=tempfile.gettempdir())


def _preload_evaluate() -> None:
    """Import `evaluate` without `EVALUATOR_IMPORTS`, which take 0.6 s in a run, more elsewhere.

    Each is imported inside `try: ... except ImportError`, and None in `sys.modules` makes that
    import fail. A module that is already imported costs nothing and stays.
    Source: the open issue https://github.com/huggingface/evaluate/issues/387.
    """
    if "evaluate" in sys.modules:
        return
    hidden = [name for name in EVALUATOR_IMPORTS if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        importlib.import_module("evaluate")
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def metric_names(names: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """List the scores of an evaluation, `loss` last; `others` do not count for their mean."""
    return [*names, *(["combined_score"] if len(names) > 1 else []), *others, "loss"]


def other_metrics(task: Task) -> tuple[str, ...]:
    """List what a finished run reports besides the metrics of its task."""
    return tuple(name for name in OF_CLASSIFIERS if task.labels and name not in task.metrics)


def display_name(name: str, labels: Sequence[str]) -> str:
    """Name a metric for people: F1 with the class that it is the F1 of.

    Args:
        labels: names of the classes in the order of their numbers; empty for a regression.
    """
    return f"f1 of {labels[1]!r}" if name == "f1" else name


def with_metric(splits: "Splits", name: str | None) -> "Splits":
    """Return the splits with the metric that chooses the best model among those of evaluations.

    Raises:
        InputError: there is no such metric.
    """
    task = splits.task
    known = metric_names(task.metrics, other_metrics(task))
    if name is not None and name not in known:
        raise InputError(f"--metric_for_best_model must be one of {', '.join(known)}, got {name!r}")
    if name not in other_metrics(task):
        return splits
    return dataclasses.replace(splits, task=dataclasses.replace(task, others=(name,)))


def best_metric_name(names: Sequence[str]) -> str:
    """The metric by which GLUE scores a task."""
    return "combined_score" if len(names) > 1 else names[0]


def score_range(name: str, names: Sequence[str]) -> tuple[float, float]:
    """The lowest and highest possible value of a metric.

    Args:
        name: one of `names`, or `combined_score` for their mean.
    """
    parts = names if name == "combined_score" else (name,)
    return -sum(part in CORRELATIONS for part in parts) / len(parts), 1.0


def predictions_of(logits: Array) -> Array:
    """(rows,) class numbers of (rows, classes) logits, or the scores of (rows, 1)."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def answers_of(logits: Array, name: str) -> Array:
    """What the metric of this name is computed from: probabilities, or `predictions_of`."""
    return probabilities_of(logits) if name == "roc_auc" else predictions_of(logits)


def probabilities_of(logits: Array) -> Array:
    """(rows, classes) probabilities: the softmax in float64."""
    exponentials = np.exp(_shifted(logits))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _shifted(logits: Array) -> Array:
    """(rows, classes) logits in float64 minus the greatest of the row: `exp` cannot overflow."""
    logits = logits.astype(np.float64)
    return np.asarray(logits - logits.max(axis=1, keepdims=True))


def row_losses(logits: Array, labels: Array) -> Array:
    """Cross-entropy of each row, or the squared error of (rows, 1) logits; float64 of (rows,)."""
    if logits.shape[1] == 1:
        return np.asarray((logits[:, 0].astype(np.float64) - labels) ** 2)
    logits = _shifted(logits)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.asarray(-log_probabilities[np.arange(len(labels)), labels.astype(int)])


def mean_loss(logits: Array, labels: Array) -> float:
    """The mean of `row_losses`."""
    return float(row_losses(logits, labels).mean())


def collapsed_class(predictions: Array) -> int | None:
    """The class that is predicted for every row, or None if there are several."""
    return int(predictions[0]) if np.ptp(predictions) == 0 else None


def has_labels(labels: Array) -> bool:
    """True if the rows are labeled; those of GLUE's test splits are not."""
    return bool((labels != IGNORED).all())
