"""The content of a comparison: figures of each set, the differences of sets, and sentences."""

import dataclasses
import itertools
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.compare.runs import NOT_IN_RECIPE, ScoredRun, check_comparable, config_differences
from lib.compare.sentences import sentences
from lib.compare.significance import (
    MIN_RUNS,
    Difference,
    difference_of_means,
    holm,
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


def compare_runs(a: Sequence[ScoredRun], *others: Sequence[ScoredRun]) -> dict[str, Any]:
    """Compare a set of runs with each of the others, or summarize it; the result is plain values.

    Raises:
        InputError: the runs cannot be compared.
    """
    sets = dict(zip(_labels(), (a, *others), strict=False))
    check_comparable(list(sets.values()))
    content: dict[str, Any] = {
        "deciding_metric": best_metric_name(a[0].task.metrics),
        "sets": {name: _summarize_set(runs) for name, runs in sets.items()},
    }
    if others:
        differences = {name: _compare_sets(a, runs) for name, runs in sets.items() if name != "A"}
        deciding = [each["metrics"][content["deciding_metric"]] for each in differences.values()]
        adjusted = holm([metric["p_value"] for metric in deciding])
        for each, p_value in zip(differences.values(), adjusted, strict=True):
            each["adjusted_p_value"] = p_value
        content["differences"] = differences
    content["sentences"] = list(sentences(content))
    return content


def _labels() -> Iterator[str]:
    """A to Z, then AA, AB, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


def _name(runs: Sequence[ScoredRun]) -> str:
    """The name of the first folder without its seed: `default` of default.s1 or default/s1."""
    folder = Path(runs[0].folder).resolve()
    return re.sub(r"(^|[._-])(s|seed|f|fold)?\d+$", "", folder.name) or folder.parent.name


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
        "name": _name(runs),
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
        "values": values,
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
    """Compare set A with another in each metric of the task."""
    task, changed = a[0].task, config_differences(a[0].config, b[0].config)
    if a[0].num_train is not None:
        differences, num_pairs = _on_own_rows(a, b), len(a)
    else:
        seeds = _seeds_to_pair(a, b)
        if seeds:
            a, b = ([run for seed in seeds for run in runs if run.cut == seed] for runs in (a, b))
        differences, num_pairs = _crossed(a, b, paired=bool(seeds)), len(seeds)
    metrics = {
        name: {"title": display_name(name, task.labels), **dataclasses.asdict(difference)}
        for name, difference in differences.items()
    }
    return {
        "metrics": metrics,
        "num_pairs": num_pairs,
        "recipes_differ_in": {
            name: list(values) for name, values in changed.items() if name not in NOT_IN_RECIPE
        },
    }


def _seeds_to_pair(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> list[Any]:
    """The seeds that both sets have, if one set has all seeds of the other; else none.

    The runs of a seed are a pair: they share what the seed decides, such as the order of the rows
    and the new classifier. A seed that is good for one recipe is often good for the other, so the
    runs of other seeds are left out rather than set against them.
    """
    seeds_a, seeds_b = ([run.cut for run in runs] for runs in (a, b))
    shared = [seed for seed in seeds_a if seed in seeds_b]
    distinct = len({*seeds_a}) == len(a) and len({*seeds_b}) == len(b)
    if distinct and MIN_RUNS <= len(shared) == min(len(a), len(b)):
        return shared
    return []


def _crossed(
    a: Sequence[ScoredRun], b: Sequence[ScoredRun], *, paired: bool
) -> dict[str, Difference]:
    """The differences of runs that are all scored on the same rows."""
    task, labels = a[0].task, a[0].labels
    predictions = np.stack([run.predictions for run in (*a, *b)])
    scores = [compute(task.metrics, row, labels) for row in predictions]
    covariances = score_covariances(task.metrics, predictions, labels, seed=0)
    differences = {}
    for name, covariance in covariances.items():
        values = np.array([score[name] for score in scores])
        differences[name] = difference_of_means(
            values[: len(a)],
            values[len(a) :],
            covariance,
            score_range(name, task.metrics),
            paired=paired,
        )
    return differences


def _on_own_rows(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> dict[str, Difference]:
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
