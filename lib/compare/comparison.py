"""The content of a comparison: figures of each set, the difference of two, and sentences."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lib.compare.runs import NOT_IN_RECIPE, ScoredRun, check_comparable, config_differences
from lib.compare.significance import (
    MIN_RUNS,
    Difference,
    difference_of_means,
    paired_difference,
    score_covariances,
    standard_error_of_share,
    summarize,
)
from lib.errors import InputError
from lib.training.metrics import (
    best_metric_name,
    compute,
    display_name,
    metric_names,
    other_metrics,
    score_range,
)

LOWER_IS_BETTER = ("loss", "seconds")


def compare_runs(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Any]:
    """Compare two sets of runs, or summarize one if `b` is empty; the result is plain values.

    Raises:
        InputError: the runs cannot be compared.
    """
    sets = {name: runs for name, runs in (("A", a), ("B", b)) if runs}
    check_comparable(list(sets.values()))
    content: dict[str, Any] = {"sets": {name: _summarize_set(runs) for name, runs in sets.items()}}
    if b:
        content["difference"] = _compare_sets(a, b)
    content["sentences"] = list(_sentences(content))
    return content


def _summarize_set(runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Summarize each figure over the runs of a set, and note what stands out."""
    task, num_rows = runs[0].task, len(runs[0].labels)
    differing = {
        name: None
        for run in runs[1:]
        for name in config_differences(runs[0].config, run.config)
        if name not in NOT_IN_RECIPE
    }
    accuracy = None
    if task.labels:
        hits = [run.predictions == run.labels for run in runs]
        accuracy = float(np.mean(np.concatenate(hits)))
    return {
        "runs": [run.folder for run in runs],
        "num_rows": num_rows,
        "cut_from_training_rows": runs[0].num_train is not None,
        "figures": {
            name: _summarize_figure(name, runs)
            for name in runs[0].figures
            if all(name in run.figures for run in runs)
        },
        "collapsed": {run.folder: run.collapsed_to for run in runs if run.collapsed_to is not None},
        "recipes_differ_in": list(differing),
        "accuracy": accuracy,
        "standard_error_of_rows": None
        if accuracy is None or runs[0].num_train is not None
        else standard_error_of_share(accuracy, num_rows),
    }


def _summarize_figure(name: str, runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Summarize one figure over the runs of a set; a score's interval stays in its range."""
    task = runs[0].task
    values = [run.figures[name] for run in runs]
    metric = name.removeprefix("eval_")
    is_score = (
        name.startswith("eval_") and metric in metric_names(task.metrics, other_metrics(task))[:-1]
    )
    worst, best = int(np.argmin(values)), int(np.argmax(values))
    if any(word in name for word in LOWER_IS_BETTER):
        worst, best = best, worst
    return {
        "title": name.replace(metric, display_name(metric, task.labels)),
        **dataclasses.asdict(
            summarize(
                values,
                score_range(metric, task.metrics) if is_score else None,
                _rows_ratio(runs) if name.startswith("eval_") else 0.0,
            )
        ),
        "best": {"value": values[best], "run": runs[best].folder},
        "worst": {"value": values[worst], "run": runs[worst].folder},
    }


def _rows_ratio(runs: Sequence[ScoredRun]) -> float:
    """Validation rows for each training row, where they were cut from those; else 0."""
    return float(np.mean([len(run.labels) / run.num_train if run.num_train else 0 for run in runs]))


def _compare_sets(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Any]:
    """Compare set A with set B in each metric of the task, and name the metric that decides."""
    task = a[0].task
    differences = _paired(a, b) if a[0].num_train is not None else _crossed(a, b)
    metrics = {
        name: {"title": display_name(name, task.labels), **dataclasses.asdict(difference)}
        for name, difference in differences.items()
    }
    changed = config_differences(a[0].config, b[0].config)
    return {
        "deciding_metric": best_metric_name(task.metrics),
        "metrics": metrics,
        "recipes_differ_in": {
            name: list(values) for name, values in changed.items() if name not in NOT_IN_RECIPE
        },
    }


def _crossed(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Difference]:
    """The differences of runs that are all scored on the same rows."""
    task, labels = a[0].task, a[0].labels
    predictions = np.stack([run.predictions for run in (*a, *b)])
    scores = [compute(task.metrics, row, labels) for row in predictions]
    covariances = score_covariances(task.metrics, predictions, labels, seed=0)
    differences = {}
    for name, covariance in covariances.items():
        values = np.array([score[name] for score in scores])
        differences[name] = difference_of_means(
            values[: len(a)], values[len(a) :], covariance, score_range(name, task.metrics)
        )
    return differences


def _paired(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Difference]:
    """The differences of runs that are scored on the same rows only in pairs."""
    if len(a) < 2:
        raise InputError(
            f"{a[0].folder} and {b[0].folder} are one pair of runs on rows of their own: a "
            "comparison takes two pairs at least, of other folds or seeds"
        )
    task, partners = a[0].task, {run.cut: run for run in b}
    pairs = [(run, partners[run.cut]) for run in a]
    scores = [[compute(task.metrics, r.predictions, r.labels) for r in pair] for pair in pairs]
    return {
        name: paired_difference(
            np.array([one[name] for one, _ in scores]),
            np.array([other[name] for _, other in scores]),
            _rows_ratio(a),
            score_range(name, task.metrics),
        )
        for name in scores[0][0]
    }


def _sentences(content: Mapping[str, Any]) -> Iterator[str]:
    """Say what the figures mean, and what they do not."""
    sets = content["sets"]
    for label, one in sets.items():
        if len(one["runs"]) == 1:
            yield f"{label} is a single run: one seed has no interval."
        for run, name in one["collapsed"].items():
            yield (
                f"{run} ({label}) collapsed: it predicts every row as {name!r}. The figures "
                "include it, because a recipe that collapses does so with other seeds too."
            )
        if one["recipes_differ_in"]:
            yield (
                f"The runs of {label} are not of one recipe (they differ in "
                f"{', '.join(one['recipes_differ_in'])}): their spread is not that of seeds."
            )
    if "difference" in content:
        yield from _difference_sentences(content["difference"], sets["A"], sets["B"])
    first = sets["A"]
    if first["cut_from_training_rows"]:
        yield (
            "The runs validate on different rows, cut from their training rows. As those overlap, "
            "the intervals allow for more variance than between independent runs (Nadeau and "
            "Bengio, 2003)."
        )
    if first["standard_error_of_rows"] is not None:
        yield (
            f"With {first['num_rows']} validation rows the accuracy of each model has a standard "
            f"error of {points(first['standard_error_of_rows'])} points, which more seeds do not "
            f"reduce: sqrt(p (1 - p) / n) with p = {first['accuracy']:.3f}."
        )


def _difference_sentences(
    difference: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[str]:
    deciding = dict(difference["metrics"][difference["deciding_metric"]])
    title, found = deciding.pop("title"), Difference(**deciding)
    low, high = found.interval
    interval = (
        f"{title}: A - B is {points(found.difference, sign=True)} points, with a 95% interval from "
        f"{points(low, sign=True)} to {points(high, sign=True)}"
    )
    paired = a["cut_from_training_rows"]
    over = "pairs of runs on the same rows" if paired else "seeds and rows"
    covered = "" if paired else ", which covers other rows but not other seeds"
    if found.distinguishable is None:
        yield (
            f"{interval}{covered}. Too few runs to tell "
            f"whether the recipes differ: it takes at least {MIN_RUNS} of each, here are "
            f"{len(a['runs'])} and {len(b['runs'])}."
        )
    elif found.distinguishable:
        yield (
            f"{interval} over {over}: {'A' if found.difference > 0 else 'B'} is higher by "
            f"more than noise (p = {found.p_value:.2g})."
        )
    else:
        yield (f"{interval} over {over}: not distinguishable from noise (p = {found.p_value:.2g}).")
    changed = [
        f"{field} {one} and {other}"
        for field, (one, other) in difference["recipes_differ_in"].items()
    ]
    yield f"The first runs of A and B differ in: {', '.join(changed) or 'nothing but the seed'}."


def points(share: float, *, sign: bool = False) -> str:
    """Format a share of 1 as percentage points."""
    return f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
