"""The content of a leaderboard: a line for each run, the best first."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.checkpoints.run_folder import read_status
from lib.compare.runs import NOT_IN_RECIPE, ScoredRun, read_run, rows_mismatch
from lib.errors import InputError
from lib.training.metrics import best_metric_name, display_name, metric_names

SPEED = "train_examples_per_second"


def rank_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Rank runs by the score of their best models; the result is plain values.

    Runs that were scored on the same validation rows share a board. Unfinished ones are named.

    Raises:
        InputError: a folder holds no run, or none is finished.
    """
    boards: list[list[ScoredRun]] = []
    unfinished = []
    for folder in folders:
        status = read_status(folder)
        if status.get("status", "finished") != "finished":
            unfinished.append({"run": str(folder), **status})
            continue
        run = read_run(folder)
        board = next((runs for runs in boards if rows_mismatch(runs[0], run) is None), None)
        if board is None:
            boards.append([run])
        else:
            board.append(run)
    if not boards:
        raise InputError(f"none of the {len(folders)} runs is finished: there is nothing to rank")
    content = {"boards": [_board(runs) for runs in boards], "unfinished": unfinished}
    return {**content, "sentences": list(_sentences(content))}


def _board(runs: Sequence[ScoredRun]) -> dict[str, Any]:
    """Rank runs by the metric that decides their task, and note the flags in which they differ."""
    task = runs[0].task
    metric = best_metric_name(task.metrics)
    settings = [{**run.config, "data": run.fingerprint[:8]} for run in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    shown = [
        name
        for name in names
        if name not in {*NOT_IN_RECIPE, "model_name_or_path"}
        and len({str(values[name]) for values in settings if name in values}) > 1
    ]
    lines = [
        {
            "run": run.folder,
            "model": run.config["model_name_or_path"],
            "seed": run.config.get("seed"),
            "settings": {name: values.get(name) for name in shown},
            "validation": _scores(run, "eval"),
            "test": _scores(run, "test"),
            SPEED: run.figures[SPEED],
            "collapsed_to": run.collapsed_to,
        }
        for run, values in zip(runs, settings, strict=True)
    ]
    return {
        "task": runs[0].config.get("task_name"),
        "num_rows": len(runs[0].labels),
        "metric": metric,
        "titles": {name: display_name(name, task.labels) for name in metric_names(task.metrics)},
        "runs": sorted(lines, key=lambda line: -line["validation"][metric]["value"]),
    }


def _scores(run: ScoredRun, part: str) -> dict[str, dict[str, Any]]:
    """The scores of a split with their intervals; empty if it has no labels."""
    return {
        name: {
            "value": run.results[f"{part}_{name}"],
            "interval": run.results.get(f"{part}_{name}_ci95"),  # the loss has none
        }
        for name in metric_names(run.task.metrics)
        if f"{part}_{name}" in run.results
    }


def _sentences(content: Mapping[str, Any]) -> Iterator[str]:
    """Say what the ranks mean, and what is not in them."""
    if any(len(board["runs"]) > 1 for board in content["boards"]):
        yield (
            "Intervals are those of other validation rows. The first of many runs on the same rows "
            "is partly lucky: --against tells whether two recipes differ."
        )
    for board in content["boards"]:
        for line in board["runs"]:
            if line["collapsed_to"] is not None:
                yield (
                    f"{line['run']} collapsed: it predicts every row as {line['collapsed_to']!r}."
                )
    for run in content["unfinished"]:
        yield f"{run['run']} is not finished: {run['status']}, at update {run.get('update', 0)}."
