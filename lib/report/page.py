"""The page that shows how a run went: one HTML file without scripts or network, and its plots.

Matplotlib and Jinja take a second to import: this module is, where the page is written.
"""

import base64
import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lib.checkpoints.output import replacing, write_text, writing
from lib.data.tasks import Task
from lib.report import plots
from lib.tracking.run_log import METRICS_FILE
from lib.training import metrics

Array = NDArray[Any]

FOLDER = "report"
NUM_MISTAKES = 20
DOTS_PER_INCH = 200

# In the order of the page.
TITLES = {
    "learning_curve": "Learning curve",
    "confusion_matrix": "Confusion matrix",
    "score_scatter": "Predictions against labels",
    "calibration": "Calibration",
    "precision_recall": "Precision and recall",
    "learning_rate": "Learning rate",
    "throughput": "Throughput",
    "token_lengths": "Token lengths and padding",
}

SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "max_length",
    "label_smoothing",
    "seed",
)


def write_page(
    folder: Path,
    *,
    task: Task,
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    padding: Mapping[str, float],
) -> dict[str, str]:
    """Write report/index.html and its plots, from the log and the predictions in `folder`.

    Args:
        folder: output folder of a run whose updates and predictions are all written.
        results, manifest, config: as the folder's files of these names hold them.
        rows: the validation split that chose the best model, with its texts.
        lengths: tokens of each training row.
        padding: shares of padding as `batching.padding_shares` gives them.

    Returns:
        The plots as title and path relative to `folder`, in the order of the page.

    Raises:
        InputError: they cannot be written.
    """
    log = _read_json_lines(folder / METRICS_FILE)
    split = task.validation[0]
    predicted, labels = read_predictions(folder / "predictions" / f"{split}.jsonl", task.labels)
    drawn = _run_plots(log, task, results, config["max_length"], lengths, padding)
    drawn |= _prediction_plots(predicted, labels, task)

    target = folder / FOLDER
    with writing(target):
        target.mkdir(exist_ok=True)
    figures = []
    for name, title in TITLES.items():
        path = target / f"{name}.png"
        if name not in drawn:
            path.unlink(missing_ok=True)  # of another run in this folder
            continue
        figure, caption = drawn[name]
        picture = _png(figure)
        with replacing(path) as new:
            new.write_bytes(picture)
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        figures.append({"title": title, "caption": caption, "source": source})
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("template.html").render(
        name=folder.resolve().name,
        model=manifest["model"],
        data=manifest["data"],
        task_name=config["task_name"],
        num_rows=len(labels),
        split=split,
        verdict=verdict(predicted, labels, task.labels),
        tables=score_tables(results, task),
        figures=figures,
        mistakes=mistakes(predicted, labels, rows, task, max_words=config["max_length"]),
        regression=not task.labels,
        facts=_facts(manifest, config, results),
    )
    write_text(target / "index.html", page)
    return {title: f"{FOLDER}/{name}.png" for name, title in TITLES.items() if name in drawn}


def read_predictions(path: Path, names: Sequence[str]) -> tuple[Array, Array]:
    """What `report.write_predictions` wrote of a labelled split.

    Returns:
        (rows, classes) probabilities and (rows,) class numbers; for a regression, without
        `names`, (rows,) predicted and (rows,) labelled scores.
    """
    lines = _read_json_lines(path)
    if not names:
        scores = [(line["prediction"], line["label"]) for line in lines]
        return np.array(scores)[:, 0], np.array(scores)[:, 1]
    numbers = {name: number for number, name in enumerate(names)}
    probabilities = [[line["probabilities"][name] for name in names] for line in lines]
    return np.array(probabilities), np.array([numbers[line["label"]] for line in lines])


# ------------------------------------------------------------------------------------ in words


def verdict(predicted: Array, labels: Array, names: Sequence[str]) -> list[str]:
    """Sentences on whether the model tells rows apart at all, and what a constant would score.

    Args:
        predicted, labels: as `read_predictions` gives them.
    """
    if not names:
        spread = f"Predictions go from {_range(predicted)}, labels from {_range(labels)}."
        if predicted.std() < 0.01 * labels.std():
            return [
                f"The model has collapsed into one score: it does not tell rows apart. {spread}"
            ]
        return [f"The model has not collapsed into one score. {spread}"]
    counts = np.bincount(predicted.argmax(axis=1), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    found = [number for number in order if counts[number]]
    missing = [names[number] for number in range(len(names)) if not counts[number]]
    if len(found) == 1:
        first = (
            f"The classifier has collapsed into one class: it predicts {names[found[0]]!r} for "
            "every row, so it has not learned to tell the classes apart."
        )
    else:
        first = "The classifier has not collapsed into one class"
        if len(names) <= plots.MOST_NUMBERS:
            parts = [f"{names[number]!r} for {counts[number]}" for number in found]
            first += f": it predicts {', '.join(parts[:-1])} and {parts[-1]} of the rows"
        first += "."
        if missing:
            shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            first += f" {len(missing)} of the {len(names)} classes it never predicts: {shown}."
    labelled = np.bincount(labels, minlength=len(names))
    most = int(labelled.argmax())
    accuracy = np.mean(predicted.argmax(axis=1) == labels)
    return [
        first,
        f"{accuracy:.1%} of the rows are classified correctly. Always answering {names[most]!r}, "
        f"the most frequent label, would give {labelled[most] / len(labels):.1%}.",
    ]


def _range(scores: Array) -> str:
    return f"{scores.min():.2f} to {scores.max():.2f}"


def score_tables(results: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """For each split that was scored: its name, number of rows, and (metric, value, interval)."""
    tables = []
    for part, splits in (("eval", task.validation), ("test", task.test)):
        for prefix, split in zip((part, f"{part}_mm"), splits, strict=False):
            scores = []
            for name in metrics.metric_names(task.metrics):
                value = results.get(f"{prefix}_{name}")
                interval = results.get(f"{prefix}_{name}_ci95")
                if value is not None:
                    words = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
                    scores.append((name, f"{value:.4f}", words))
            if scores:
                count = results[f"{prefix}_num_rows"]
                tables.append({"split": split, "num_rows": count, "scores": scores})
    return tables


def _facts(
    manifest: Mapping[str, Any], config: Mapping[str, Any], results: Mapping[str, Any]
) -> list[tuple[str, str]]:
    revision, commit = manifest["model_revision"], manifest["commit"]
    versions = [f"{name} {number}" for name, number in manifest["versions"].items()]
    settings = [f"{name} {config[name]}" for name in SETTINGS if config[name] is not None]
    return [
        ("model", manifest["model"] + (f", revision {revision}" if revision else "")),
        ("data", manifest["data"]),
        ("fingerprint of the data", manifest["data_fingerprint"]),
        ("seed", str(config["seed"])),
        ("settings", ", ".join(settings)),
        ("updates", f"{results['num_updates']}; the saved model is of {results['best_update']}"),
        ("device", f"{manifest['device']}, precision {manifest['precision']}"),
        ("versions", ", ".join(versions)),
        ("commit", commit or "not run from a git repository"),
        ("command", manifest["command"]),
    ]


# ----------------------------------------------------------------------------------- mistakes


def most_confident_mistakes(probabilities: Array, labels: Array, count: int) -> list[int]:
    """The wrongly classified rows, those with the most probable prediction first.

    Args:
        probabilities: (rows, classes).
        labels: (rows,) class numbers.
        count: of rows to return, if there are as many.
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    order = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return [int(row) for row in wrong[order][:count]]


def largest_errors(predictions: Array, labels: Array, count: int) -> list[int]:
    """The rows of a regression whose predicted score is farthest from the label, farthest first."""
    order = np.argsort(-np.abs(predictions - labels), kind="stable")
    return [int(row) for row in order[:count]]


def mistakes(
    predicted: Array,
    labels: Array,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    *,
    max_words: int,
) -> list[dict[str, Any]]:
    """The worst rows for the page: number, what was predicted and labelled, marked texts.

    Args:
        predicted, labels: as `read_predictions` gives them.
        max_words: of each text. More than the tokens that the model reads explain nothing, and
            comparing two texts takes time with the square of their length.
    """
    found = []
    if task.labels:
        for row in most_confident_mistakes(predicted, labels, NUM_MISTAKES):
            number = int(predicted[row].argmax())
            found.append((row, task.labels[number], f"{predicted[row, number]:.1%}"))
    else:
        for row in largest_errors(predicted, labels, NUM_MISTAKES):
            error = predicted[row] - labels[row]
            found.append((row, f"{predicted[row]:.2f}", f"{error:+.2f}"))
    return [
        {
            "row": row,
            "prediction": prediction,
            "detail": detail,
            "label": task.labels[labels[row]] if task.labels else f"{labels[row]:.2f}",
            "texts": mark_differences([rows[row][name] for name in task.columns], max_words),
        }
        for row, prediction, detail in found
    ]


def mark_differences(texts: Sequence[str], max_words: int) -> list[list[tuple[str, bool]]]:
    """One or two texts as pieces, each with whether the other text lacks it.

    Words and punctuation marks are compared as they are written.
    """
    words = [_words(text, max_words) for text in texts]
    if len(words) == 1:
        return [[("".join(words[0]), False)]]
    first, second = ([word.strip() for word in text] for text in words)
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    marked: list[list[tuple[str, bool]]] = [[], []]
    for kind, *ends in matcher.get_opcodes():
        for side in (0, 1):
            piece = "".join(words[side][ends[2 * side] : ends[2 * side + 1]])
            text = piece.lstrip()
            marked[side] += [(piece[: len(piece) - len(text)], False), (text, kind != "equal")]
    return [[part for part in side if part[0]] for side in marked]


def _words(text: str, max_words: int) -> list[str]:
    words = re.findall(r"\s*(?:\w+|[^\w\s])", text.strip())
    return words if len(words) <= max_words else [*words[:max_words], " …"]


# -------------------------------------------------------------------------------------- plots


def _run_plots(
    log: Sequence[Mapping[str, Any]],
    task: Task,
    results: Mapping[str, Any],
    max_length: int,
    lengths: Sequence[int],
    padding: Mapping[str, float],
) -> dict[str, tuple[Figure, str]]:
    """Figures and captions of how the run went."""
    logged = [line for line in log if "loss" in line]
    evaluated = [line for line in log if "eval_loss" in line]
    updates = [line["update"] for line in logged]
    rates = [line["learning_rate"] for line in logged]
    speeds = [line["examples_per_second"] for line in logged]
    names = [name for name in metrics.metric_names(task.metrics) if name != "loss"]
    final = {name: (results[f"eval_{name}"], *results[f"eval_{name}_ci95"]) for name in names}
    curve = plots.learning_curve(
        updates,
        [line["loss"] for line in logged],
        [line["update"] for line in evaluated],
        [line["eval_loss"] for line in evaluated],
        {name: [line[f"eval_{name}"] for line in evaluated] for name in names},
        best_update=results["best_update"],
        final=final,
    )
    cut = sum(length == max_length for length in lengths)
    paces = {}
    if logged:  # a run may stop early before its first line
        paces = {
            "learning_rate": (
                plots.learning_rate(updates, rates),
                f"Its highest logged value is {max(rates):.3g}.",
            ),
            "throughput": (
                plots.throughput(updates, speeds),
                f"The median is {np.median(speeds):.1f} training rows per second, without "
                "evaluations.",
            ),
        }
    return {
        "learning_curve": (
            curve,
            f"Loss and metrics over {results['num_updates']} updates; the model of update "
            f"{results['best_update']} was saved.",
        ),
        **paces,
        "token_lengths": (
            plots.token_lengths(lengths, max_length, padding),
            f"The median training row has {np.median(lengths):.0f} tokens, the longest "
            f"{max(lengths)}; {cut} reach max_length, where rows are truncated. Of the tokens in "
            f"this run's batches {padding['this run']:.1%} were padding, against "
            f"{padding['plain dynamic']:.1%} with rows in the order of the file and "
            f"{padding['fixed length']:.1%} at a fixed length of {max_length}.",
        ),
    }


def _prediction_plots(predicted: Array, labels: Array, task: Task) -> dict[str, tuple[Figure, str]]:
    """Figures and captions of what the saved model predicts."""
    if not task.labels:
        error = np.mean(np.abs(predicted - labels))
        scatter = plots.score_scatter(predicted, labels)
        return {"score_scatter": (scatter, f"The mean absolute error is {error:.3f}.")}
    answers = predicted.argmax(axis=1)
    wrong = int((answers != labels).sum())
    confidences, accuracies, counts = metrics.calibration_bins(predicted, labels)
    calibration_error = metrics.expected_calibration_error(confidences, accuracies, counts)
    mean = predicted.max(axis=1).mean()
    drawn = {
        "confusion_matrix": (
            plots.confusion_matrix(answers, labels, task.labels),
            f"{wrong} of {len(labels)} rows are classified wrongly. Percentages are of the label.",
        ),
        "calibration": (
            plots.calibration(confidences, accuracies, counts, 1 / len(task.labels)),
            f"The expected calibration error is {calibration_error:.3f} in {len(counts)} bins. The "
            f"mean confidence is {mean:.1%}, the accuracy {1 - wrong / len(labels):.1%}.",
        ),
    }
    curves = plots.precision_recall(predicted, labels, task.labels)
    if curves is not None:
        figure, averages = curves
        words = ", ".join(f"{value:.3f} for {name}" for name, value in averages.items())
        caption = f"The average precision is {words}. A dot is where the predictions are."
        drawn["precision_recall"] = (figure, caption)
    return drawn


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without Matplotlib's version: the same figure is the same file.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
