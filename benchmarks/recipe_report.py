"""Print the table of scores of docs/recipe.md from the folders that `benchmarks/recipe.py` left.

    python -m benchmarks.recipe_report runs

It also writes predictions that the runs did not keep, as runs that `python -m lib.compare` reads:

- `runs/last/RECIPE.sSEED`: of each run at its last update, which no choice has flattered;
- `runs/last/averaged.sSEED`: of the default, with the mean of the weights at the last evaluations;
- `runs/both_orders.sSEED`: of the default's best model, the mean of its probabilities for both
  orders of a pair.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.recipe import DEFAULT, RECIPES, finished_runs
from benchmarks.recipe_evaluations import FILE
from lib.data.tasks import TASKS
from lib.report.predictions import read_predictions, write_predictions
from lib.training import metrics

Array = NDArray[Any]

TASK = TASKS["mrpc"]
DECIDING = metrics.best_metric_name(TASK.metrics)
PREDICTIONS = Path("predictions") / "validation.jsonl"
NUM_HALVINGS = 1_000


def write_derived(run: Path, target: Path, logits: Array) -> None:
    """Write a run like `run` with these (rows, classes) logits of the validation rows."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(FILE, "MRPC.tsv"))
    _, labels = read_predictions(run / PREDICTIONS, TASK.labels)
    write_predictions(target / PREDICTIONS, logits, labels, TASK.labels)
    results = json.loads((run / "all_results.json").read_text())
    scores = metrics.compute(TASK.metrics, logits.argmax(-1), labels)
    results |= {f"eval_{metric}": float(score) for metric, score in scores.items()}
    (target / "all_results.json").write_text(json.dumps(results))


def choices(evaluations: Array, labels: Array) -> dict[str, float]:
    """What choosing one of the evaluations of a run by its score is worth.

    Args:
        evaluations: (evaluations, rows, classes) logits of the validation rows.

    Returns:
        The score of the `best` evaluation on the rows that chose it, of the `last`, and of the one
        that one half of the rows chooses, on the other (`cross_fitted`: mean over halvings).
    """
    predictions = evaluations.argmax(-1)
    whole = _scores(predictions, labels, np.ones((1, len(labels))))[0]
    generator = np.random.default_rng(0)
    halves = np.zeros((NUM_HALVINGS, len(labels)))
    for half in halves:
        half[generator.permutation(len(labels))[: len(labels) // 2]] = 1
    one, other = (_scores(predictions, labels, weights) for weights in (halves, 1 - halves))
    rows = np.arange(NUM_HALVINGS)
    chosen = [other[rows, one.argmax(1)], one[rows, other.argmax(1)]]
    return {"best": whole.max(), "last": whole[-1], "cross_fitted": float(np.mean(chosen))}


def _scores(predictions: Array, labels: Array, weights: Array) -> Array:
    """(weightings, evaluations) of the metric that decides."""
    return metrics.resampled_scores(TASK.metrics, predictions, labels, weights)[DECIDING]


def table(folder: Path) -> Iterator[str]:
    """Markdown: a row for each recipe that has finished runs."""
    yield "| recipe | seeds | accuracy | F1 | combined | last update | cross-fitted | minutes |"
    yield "|---|---|---|---|---|---|---|---|"
    for recipe in RECIPES:
        runs = finished_runs(folder, recipe)
        if runs:
            yield _row(recipe, runs)


def _row(recipe: str, runs: Mapping[int, Path]) -> str:
    columns: dict[str, list[float]] = {}
    for run in runs.values():
        results = json.loads((run / "all_results.json").read_text())
        values = {name: results[f"eval_{name}"] for name in ("accuracy", "f1", DECIDING)}
        _, labels = read_predictions(run / PREDICTIONS, TASK.labels)
        values |= choices(np.load(run / FILE)["logits"], labels)
        values["minutes"] = results["train_seconds"] / 60
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    shown = ("accuracy", "f1", DECIDING, "last", "cross_fitted")
    scores = " | ".join(_spread(columns[name]) for name in shown)
    minutes = min(columns["minutes"])  # of a run that nothing held up
    return f"| {recipe} | {min(runs)} to {max(runs)} | {scores} | {minutes:.1f} |"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def write_predictions_not_kept(folder: Path) -> None:
    """Write the runs that the docstring of this module lists."""
    last = folder / "last"
    last.mkdir(exist_ok=True)
    for recipe in RECIPES:
        for seed, run in finished_runs(folder, recipe).items():
            found = np.load(run / FILE)
            write_derived(run, last / run.name, found["logits"][-1])
            if recipe == DEFAULT:
                write_derived(run, last / f"averaged.s{seed}", found["averaged"])
                best, _ = read_predictions(run / PREDICTIONS, TASK.labels)
                swapped = metrics.probabilities_of(found["swapped"])
                both = np.log((best + swapped) / 2)
                write_derived(run, folder / f"both_orders.s{seed}", both)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the --output_dir of benchmarks.recipe")
    folder = parser.parse_args().runs
    write_predictions_not_kept(folder)
    print("\n".join(table(folder)))


if __name__ == "__main__":
    main()
