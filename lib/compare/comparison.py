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
    score_covariances,
    standard_error_of_share,
    summarize,
)
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
    task, labels = runs[0].task, runs[0].labels
    differing = {
        name: None
        for run in runs[1:]
        for name in config_differences(runs[0].config, run.config)
        if name not in NOT_IN_RECIPE
    }
    accuracy = None
    if task.labels:
        accuracy = float(np.mean([run.predictions == labels for run in runs]))
    return {
        "runs": [run.folder for run in runs],
        "num_rows": len(labels),
        "figures": {
            name: _summarize_figure(name, runs)
            for name in runs[0].figures
            if all(name in run.figures for run in runs)
        },
        "collapsed": {run.folder: run.collapsed_to for run in runs if run.collapsed_to is not None},
        "recipes_differ_in": list(differing),
        "accuracy": accuracy,
        "standard_error_of_rows": None
        if accuracy is None
        else standard_error_of_share(accuracy, len(labels)),
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
            summarize(values, score_range(metric, task.metrics) if is_score else None)
        ),
        "best": {"value": values[best], "run": runs[best].folder},
        "worst": {"value": values[worst], "run": runs[worst].folder},
    }


def _compare_sets(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Any]:
    """Compare set A with set B in each metric of the task, and name the metric that decides."""
    task, labels = a[0].task, a[0].labels
    predictions = np.stack([run.predictions for run in (*a, *b)])
    scores = [compute(task.metrics, row, labels) for row in predictions]
    covariances = score_covariances(task.metrics, predictions, labels, seed=0)
    metrics = {}
    for name, covariance in covariances.items():
        values = np.array([score[name] for score in scores])
        difference = difference_of_means(
            values[: len(a)], values[len(a) :], covariance, score_range(name, task.metrics)
        )
        metrics[name] = {
            "title": display_name(name, task.labels),
            **dataclasses.asdict(difference),
        }
    changed = config_differences(a[0].config, b[0].config)
    return {
        "deciding_metric": best_metric_name(task.metrics),
        "metrics": metrics,
        "recipes_differ_in": {
            name: list(values) for name, values in changed.items() if name not in NOT_IN_RECIPE
        },
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
    if found.distinguishable is None:
        yield (
            f"{interval}, which covers other rows but not other seeds. Too few runs to tell "
            f"whether the recipes differ: it takes at least {MIN_RUNS} of each, here are "
            f"{len(a['runs'])} and {len(b['runs'])}."
        )
    elif found.distinguishable:
        yield (
            f"{interval} over seeds and rows: {'A' if found.difference > 0 else 'B'} is higher by "
            f"more than noise (p = {found.p_value:.2g})."
        )
    else:
        yield (
            f"{interval} over seeds and rows: not distinguishable from noise "
            f"(p = {found.p_value:.2g})."
        )
    changed = [
        f"{field} {one} and {other}"
        for field, (one, other) in difference["recipes_differ_in"].items()
    ]
    yield f"The first runs of A and B differ in: {', '.join(changed) or 'nothing but the seed'}."


def points(share: float, *, sign: bool = False) -> str:
    """Format a share of 1 as percentage points."""
    return f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
