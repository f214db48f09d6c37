"""Compare finished runs: a table over seeds, and whether two sets differ by more than noise.

    python -m lib.compare runs/default.s*
    python -m lib.compare runs/default.s* --against runs/plain.s*
    python -m lib.compare runs/default.s* --against runs/plain.s* --format html > comparison.html

A set is the runs of one recipe, each with a seed of its own. Set A is compared with set B by the
predictions that the runs left for each validation row; `lib/significance.py` says how. The verdict
is on one metric, the one that GLUE scores the task by: of several at 5% each, one would be
"different" by chance more often than that.
"""

import argparse
import dataclasses
import hashlib
import html
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.checkpoints.run_folder import (
    CONFIG_FILE,
    FACTS_FILE,
    RESULTS_FILE,
    STATUS_FILE,
    read_config,
)
from lib.cli.resuming import FREE_FLAGS
from lib.compare.significance import (
    FEWEST_RUNS,
    Difference,
    compare,
    score_covariances,
    standard_error_of_share,
    summarise,
)
from lib.data.tasks import TASKS, task_of_files
from lib.errors import InputError

# Fields in which runs of one recipe may differ.
NOT_OF_THE_RECIPE = {*FREE_FLAGS, "seed"}

LOWER_IS_BETTER = ("loss", "seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run left.

    `figures` are the numbers of its evaluation and its speeds, `predictions` (rows,) class
    numbers, or scores for a regression, `labels` (rows,) the same, `classes` their names, and
    `digest` the SHA-256 of the file of predictions.
    """

    name: str
    config: Mapping[str, Any]
    figures: Mapping[str, float]
    collapsed_to: str | None
    fingerprint: str
    classes: tuple[str, ...]
    predictions: NDArray[Any]
    labels: NDArray[Any]
    digest: str


def read_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises:
        InputError: it holds none, one that is not finished, or files that no run writes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config = read_config(folder)
    if config is None:
        raise InputError(f"{folder} is not the folder of a run: it holds no {CONFIG_FILE}")
    status = _read_json(folder / STATUS_FILE).get("status", "finished")
    written = (RESULTS_FILE, FACTS_FILE)
    missing = [name for name in written if not (folder / name).exists()]
    if status != "finished" or missing:
        found = f"its status is {status!r}" if status != "finished" else f"it has no {missing[0]}"
        raise InputError(f"{folder}: the run is not finished ({found}); run its command again")
    results, manifest = (_read_json(folder / name) for name in written)
    # What is not decided by the flags alone.
    config |= {name: manifest[name] for name in ("precision", "model_revision") if name in manifest}
    task = TASKS.get(config.get("task_name") or "")
    path = folder / "predictions" / f"{task.validation[0] if task else 'validation'}.jsonl"
    try:
        content = path.read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        classes = tuple(lines[0].get("probabilities", ()))
        value = {name: number for number, name in enumerate(classes)}.__getitem__
        predictions, labels = (
            np.array([value(line[key]) if classes else float(line[key]) for line in lines])
            for key in ("prediction", "label")
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold the prediction and the label of every row: {error!r}"
        ) from error
    figures = {
        name: float(number)
        for source, prefixes in ((results, ("eval_",)), (manifest, ("train_", "sec")))
        for name, number in source.items()
        if name.startswith(prefixes)
        and isinstance(number, int | float)
        and not name.endswith("num_rows")
    }
    return Run(
        str(folder),
        config,
        figures,
        results.get("eval_collapsed_to"),
        str(manifest.get("data_fingerprint")),
        classes,
        predictions,
        labels,
        hashlib.sha256(content).hexdigest(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The contents of a file; nothing if there is no file.

    Raises:
        InputError: it cannot be read, or holds something else than names with values.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not what a run writes: it holds no names with values")
    return content


def check_comparable(sets: Sequence[Sequence[Run]]) -> None:
    """See that all runs are scored on the same rows, and are different runs.

    Raises:
        InputError: two runs are not; the message names them.
    """
    everything = [run for runs in sets for run in runs]
    for one, other in itertools.combinations(everything, 2):
        if Path(one.name).resolve() == Path(other.name).resolve():
            raise InputError(f"{other.name} is given twice")
        reason = _other_data(one, other)
        if reason:
            raise InputError(
                f"{other.name} is not on the data of {one.name} ({reason}): compare runs on the "
                "same data"
            )
    for runs in sets:
        for one, other in itertools.combinations(runs, 2):
            if one.digest == other.digest:
                raise InputError(
                    f"{other.name} has the very predictions of {one.name}: it is the same run once "
                    "more, and says nothing of other seeds"
                )
            recipe = differences(one.config, other.config).keys() - NOT_OF_THE_RECIPE
            if one.config.get("seed") == other.config.get("seed") and not recipe:
                raise InputError(
                    f"{other.name} has the recipe and the seed of {one.name}, and says nothing of "
                    "other seeds: give one run of each seed"
                )


def _other_data(one: Run, other: Run) -> str | None:
    """Why two runs are not scored on the same data, or None."""
    tasks = [run.config.get("task_name") for run in (one, other)]
    if tasks[0] != tasks[1] or one.classes != other.classes:
        return f"tasks {tasks[0]} and {tasks[1]}" if tasks[0] != tasks[1] else "other classes"
    if len(one.labels) != len(other.labels):
        return f"{len(other.labels)} and {len(one.labels)} validation rows"
    if (one.labels != other.labels).any():
        return f"row {np.flatnonzero(one.labels != other.labels)[0]} is labelled otherwise"
    if one.fingerprint != other.fingerprint:
        return f"data_fingerprint {other.fingerprint[:8]} and {one.fingerprint[:8]}"
    return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that two configurations both have, with different values."""
    return {
        name: (value, other[name])
        for name, value in one.items()
        if name in other and other[name] != value
    }


def describe(runs: Sequence[Run]) -> dict[str, Any]:
    """A set of runs in figures: its runs, the mean of each figure over them, what stands out."""
    names = [name for name in runs[0].figures if all(name in run.figures for run in runs)]
    figures = {}
    for name in names:
        values = [run.figures[name] for run in runs]
        ranked = sorted(range(len(runs)), key=values.__getitem__)
        worst, best = ranked[0], ranked[-1]
        if any(word in name for word in LOWER_IS_BETTER):
            worst, best = best, worst
        figures[name] = {
            **dataclasses.asdict(summarise(values)),
            "best": {"value": values[best], "run": runs[best].name},
            "worst": {"value": values[worst], "run": runs[worst].name},
        }
    mixed = {
        name: None
        for run in runs[1:]
        for name in differences(runs[0].config, run.config)
        if name not in NOT_OF_THE_RECIPE
    }
    share = None
    if runs[0].classes:
        share = float(np.mean([run.predictions == run.labels for run in runs]))
    return {
        "runs": [run.name for run in runs],
        "num_rows": len(runs[0].labels),
        "figures": figures,
        "collapsed": {run.name: run.collapsed_to for run in runs if run.collapsed_to is not None},
        "recipes_differ_in": list(mixed),
        "accuracy": share,
        "standard_error_of_rows": None
        if share is None
        else standard_error_of_share(share, len(runs[0].labels)),
    }


def differ(a: Sequence[Run], b: Sequence[Run]) -> dict[str, Any]:
    """How set A differs from set B in each metric of the task, and which metric decides."""
    # 1 s of imports that a table of one set does not need.
    from lib.training.metrics import best_metric_name, compute

    classes, labels = a[0].classes, a[0].labels
    task = TASKS.get(a[0].config.get("task_name") or "") or task_of_files((), classes)
    scores = [compute(task.metrics, run.predictions, labels) for run in (*a, *b)]
    covariances = score_covariances(
        task.metrics, np.stack([run.predictions for run in (*a, *b)]), labels, seed=0
    )
    found = {}
    for name, covariance in covariances.items():
        values = np.array([score[name] for score in scores])
        found[name] = dataclasses.asdict(compare(values[: len(a)], values[len(a) :], covariance))
    recipes = differences(a[0].config, b[0].config)
    return {
        "decides": best_metric_name(task.metrics),
        "metrics": found,
        "recipes_differ_in": {
            name: list(values) for name, values in recipes.items() if name not in NOT_OF_THE_RECIPE
        },
    }


def report(a: Sequence[Run], b: Sequence[Run]) -> dict[str, Any]:
    """Everything that is said of one or two sets of runs, as plain values; `b` may be empty.

    Raises:
        InputError: they cannot be compared.
    """
    sets = {name: runs for name, runs in (("A", a), ("B", b)) if runs}
    check_comparable(list(sets.values()))
    content: dict[str, Any] = {"sets": {name: describe(runs) for name, runs in sets.items()}}
    if b:
        content["difference"] = differ(a, b)
    content["words"] = list(words(content))
    return content


def words(content: Mapping[str, Any]) -> Iterator[str]:
    """What the figures say and do not say, in sentences."""
    sets = content["sets"]
    for label, one in sets.items():
        if len(one["runs"]) == 1:
            yield f"{label} is a single run: one seed has no interval."
        for run, name in one["collapsed"].items():
            yield (
                f"{run} ({label}) collapsed: it predicts every row as {name!r}. It is in the "
                "figures, as a recipe that collapses does so with other seeds too."
            )
        if one["recipes_differ_in"]:
            yield (
                f"The runs of {label} are not of one recipe (they differ in "
                f"{', '.join(one['recipes_differ_in'])}): their spread is not that of seeds."
            )
    if "difference" in content:
        yield from _words_of_difference(content["difference"], sets["A"], sets["B"])
    first = sets["A"]
    if first["standard_error_of_rows"] is not None:
        yield (
            f"{first['num_rows']} validation rows leave a standard error of "
            f"{_points(first['standard_error_of_rows'])} points of accuracy for each model, which "
            f"more seeds do not make less: sqrt(p (1 - p) / n) with p = {first['accuracy']:.3f}."
        )


def _words_of_difference(
    found: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[str]:
    name = found["decides"]
    decisive = Difference(**found["metrics"][name])
    low, high = decisive.interval
    size = decisive.difference
    shown = (
        f"{name}: A - B is {_points(size, sign=True)} points, with a 95% interval from "
        f"{_points(low, sign=True)} to {_points(high, sign=True)}"
    )
    if decisive.distinguishable is None:
        yield (
            f"{shown}, which covers other rows but not other seeds. Whether the recipes differ "
            f"cannot be told: that takes {FEWEST_RUNS} runs of each at the least, here are "
            f"{len(a['runs'])} and {len(b['runs'])}."
        )
    elif decisive.distinguishable:
        yield (
            f"{shown} over seeds and rows: {'A' if size > 0 else 'B'} is higher by more than "
            f"noise (p = {decisive.p_value:.2g})."
        )
    else:
        yield (
            f"{shown} over seeds and rows: not distinguishable from noise "
            f"(p = {decisive.p_value:.2g})."
        )
    changed = [
        f"{field} {one} and {other}" for field, (one, other) in found["recipes_differ_in"].items()
    ]
    yield f"The first runs of A and B differ in: {', '.join(changed) or 'nothing but the seed'}."


def _points(share: float, *, sign: bool = False) -> str:
    return f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(content: Mapping[str, Any]) -> list[Table]:
    """A table of figures for each set, and one of differences if there are two sets."""
    made = []
    for label, one in content["sets"].items():
        header = ("", "n", "mean", "sd", "95% interval of the mean", "best", "worst")
        rows = []
        for name, figure in one["figures"].items():
            deviation, interval = figure["standard_deviation"], figure["interval"]
            rows.append(
                (
                    name,
                    str(figure["num_runs"]),
                    _shown(name, figure["mean"]),
                    "" if deviation is None else _shown(name, deviation),
                    "" if interval is None else " to ".join(_shown(name, v) for v in interval),
                    *(
                        f"{_shown(name, figure[end]['value'])} ({Path(figure[end]['run']).name})"
                        for end in ("best", "worst")
                    ),
                )
            )
        made.append(Table(f"{label}: {', '.join(one['runs'])}", header, tuple(rows)))
    if "difference" in content:
        differences_of = content["difference"]["metrics"]
        made.append(
            Table(
                "A - B, in points",
                ("", "difference", "standard error", "95% interval", "p"),
                tuple(
                    (
                        name,
                        _points(one["difference"], sign=True),
                        _points(one["standard_error"]),
                        " to ".join(_points(value, sign=True) for value in one["interval"]),
                        f"{one['p_value']:.2g}",
                    )
                    for name, one in differences_of.items()
                ),
            )
        )
    return made


def _shown(name: str, value: float) -> str:
    return f"{value:.4f}" if name.startswith("eval_") else f"{value:.1f}"


def as_text(content: Mapping[str, Any]) -> str:
    blocks = []
    for table in tables(content):
        lines = (table.header, *table.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([table.title, *aligned]))
    return "\n\n".join([*blocks, "\n".join(content["words"])]) + "\n"


def as_markdown(content: Mapping[str, Any]) -> str:
    def escaped(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|")

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(escaped, cells))} |"

    blocks = []
    for table in tables(content):
        rule = "|---" * len(table.header) + "|"
        rows = [line(table.header), rule, *map(line, table.rows)]
        blocks.append("\n".join([f"**{escaped(table.title)}**", "", *rows]))
    said = "\n".join(f"- {escaped(sentence)}" for sentence in content["words"])
    return "\n\n".join([*blocks, said]) + "\n"


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: the degrees of freedom of the normal."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Comparison of runs</title>
<style>
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left; }
</style>
</head>
<body>
<h1>Comparison of runs</h1>
{% for sentence in words %}<p>{{ sentence }}</p>
{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2>
<table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}</body>
</html>
"""


def as_html(content: Mapping[str, Any]) -> str:
    """A page of its own, without anything from elsewhere."""
    import jinja2

    page = jinja2.Environment(autoescape=True, keep_trailing_newline=True).from_string(PAGE)
    return page.render(words=content["words"], tables=tables(content))


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json, "html": as_html}


def main(arguments: Sequence[str]) -> int:
    """Print the comparison; the exit status, 2 for runs that cannot be compared."""
    summary, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m lib.compare",
        description=summary,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders: set A")
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="RUN", default=[], help="output folders: set B"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="text")
    given = parser.parse_args(arguments)
    try:
        content = report(
            *([read_run(path) for path in part] for part in (given.runs, given.against))
        )
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(FORMATS[given.format](content), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
