"""The scores of the best model, and the files that a finished run leaves beside it."""

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lib.backends.devices import device_name, precision
from lib.calibration.cross_fitting import calibrate, store
from lib.checkpoints.atomic import write_json, write_text, writing
from lib.checkpoints.run_folder import (
    HELD_OUT_FILE,
    PROVENANCE_FILE,
    RESULTS_FILE,
    RunFolder,
    read_config,
)
from lib.data.splits import Splits
from lib.data.tasks import Task
from lib.distributed.collectives import on_main_process
from lib.hub.download import card_metadata
from lib.model.loading import revision_of
from lib.report import predictions
from lib.report.finished_run import DATA_FILE, final_lines, read_finished_run, scores_of
from lib.report.page.mistakes import shorten, worst_rows
from lib.tracking.run_log import RunLog
from lib.training.curves import scores_of_classes
from lib.training.evaluation import Predictions, predict, score
from lib.training.metrics import (
    answers_of,
    confidence_intervals,
    has_labels,
    other_metrics,
    predictions_of,
)
from lib.training.optimization import class_weights

CARD_FILE = "README.md"
EVAL_RESULTS_FILE = ".eval_results/results.yaml"

PACKAGES = (
    "accelerate",
    "transformers",
    "datasets",
    "torch",
    "evaluate",
    "wandb",
    "numpy",
    "scikit-learn",
    "scipy",
    "tokenizers",
)


def score_splits(
    folder: Path,
    model: nn.Module,
    loaders: Mapping[str, DataLoader[Any]],
    accelerator: Accelerator,
    task: Task,
    between_batches: Callable[[], None],
    seed: int,
) -> tuple[dict[str, Any], Predictions]:
    """Predict every split, write the predictions, and score the splits with labels.

    Args:
        loaders: prepared, by split.
        seed: of the bootstrap.

    Returns:
        The scores on the main process, as `write_split` returns them, prefixed by `eval_` or
        `test_` (`eval_mm_` and `test_mm_` for MNLI's mismatched rows), with what `calibrate` fits
        under `calibration`, and the predictions of the split that chooses the best model.

    Raises:
        InputError: on all processes, if the folder cannot be written.
    """
    scores: dict[str, Any] = {}
    predicted = {}
    for part, splits in (("eval", task.validation), ("test", task.test)):
        found = [split for split in splits if split in loaders]
        for prefix, split in zip((part, f"{part}_mm"), found, strict=False):
            predicted[split] = predict(model, loaders[split], accelerator, between_batches)
            write = partial(write_split, folder, split, predicted[split], task, seed=seed)
            written = on_main_process(accelerator, write) or {}
            scores |= {f"{prefix}_{name}": value for name, value in written.items()}
    chosen_on = predicted[task.validation[0]]
    if accelerator.is_main_process and task.labels:
        logits, labels = chosen_on.logits, chosen_on.labels
        calibration = calibrate(logits, labels, task.metrics, seed=seed)
        if calibration:
            store(folder, calibration)
            scores["calibration"] = calibration
    return scores, chosen_on


def write_split(
    folder: Path, split: str, predicted: Predictions, task: Task, *, seed: int
) -> dict[str, Any]:
    """Write the predictions of a split; return its scores with intervals, if it has labels.

    Returns:
        The task's metrics, `other_metrics` and `loss`, each metric's 95% interval as
        `<metric>_ci95`, `num_rows`, `classes` (as `scores_of_classes` returns it), and
        `collapsed_to` if every row is predicted as one class.

    Raises:
        InputError: the folder cannot be written.
    """
    target = folder / predictions.FOLDER
    with writing(target):
        target.mkdir(exist_ok=True)
    logits, labels = predicted.logits, predicted.labels
    predictions.write_predictions(target / f"{split}.jsonl", logits, labels, task.labels)
    if split in task.test and task.submissions:
        name = task.submissions[task.test.index(split)]
        answers = predictions_of(logits)
        predictions.write_submission(
            target / name, answers, task.labels, submits_names=task.submits_names
        )
    if not has_labels(labels):
        return {"num_rows": len(labels)}
    others, answers = other_metrics(task), predictions_of(logits)
    evaluated = score(predicted, task, others)
    intervals = confidence_intervals(task.metrics, answers, labels, seed=seed)
    for name in others:
        intervals |= confidence_intervals([name], answers_of(logits, name), labels, seed=seed)
    results: dict[str, Any] = dict(evaluated.scores)
    results |= {f"{name}_ci95": list(interval) for name, interval in intervals.items()}
    results["num_rows"] = len(labels)
    if task.labels:
        results["classes"] = scores_of_classes(answers, labels, task.labels)
    if evaluated.collapsed_to is not None:
        results["collapsed_to"] = evaluated.collapsed_to
    return results


def finish(
    folder: RunFolder,
    log: RunLog,
    config: Mapping[str, Any],
    splits: Splits,
    results: Mapping[str, Any],
    provenance: Mapping[str, Any],
    predicted: Predictions,
    lengths: NDArray[Any],
    padding: Mapping[str, float],
) -> None:
    """Write everything that a finished run leaves beside its model, and print the scores.

    Args:
        config: as config.yaml has it.
        predicted: the predictions of the split that chose the best model.
        lengths, padding: as for `write_results`.
    """
    rows = next(iter(splits.validation.values()))
    write_results(
        folder.path,
        results,
        task=splits.task,
        provenance=provenance,
        rows=rows,
        lengths=lengths,
        padding=padding,
    )
    write_report(folder.path)
    if splits.held_out is not None:
        write_json(folder.path / HELD_OUT_FILE, {"rows": splits.held_out.tolist()})
    texts = {column: rows[column] for column in splits.task.columns}
    log.results(results, provenance, predicted, texts, splits.task.labels, config["log_model"])
    log.trackers.finish()  # first: a run that is killed meanwhile is resumed, and ends them
    folder.write_status("finished", results["num_updates"])
    if config["save_only_model"]:
        folder.discard_checkpoints()
    scores, _ = scores_of(results, splits.task)
    for line in final_lines(folder.path, splits.task, scores, results["best_update"]):
        print(line)


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    *,
    task: Task,
    provenance: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    lengths: NDArray[Any],
    padding: Mapping[str, float],
) -> None:
    """Write all_results.json, manifest.json and report/data.json.

    The last holds what `write_report` needs and no other file in the folder has: the task, the
    texts of the rows shown, token lengths and padding.

    Args:
        folder: output folder, in which config.yaml and predictions/ are complete.
        results: the scores of each split, prefixed, and what the training took.
        provenance: as `provenance` returns it.
        rows: the validation split that chose the best model, with its text columns.
        lengths: tokens of each training row.
        padding: shares of padding as `batching.padding_shares` returns them.

    Raises:
        InputError: the folder cannot be written.
    """
    config = read_config(folder)
    assert config is not None, "a run writes its configuration before it trains"
    path = folder / predictions.FOLDER / f"{task.validation[0]}.jsonl"
    shown = worst_rows(*predictions.read_predictions(path, task.labels))
    counts = np.bincount(lengths)
    data = {
        "task": {
            name: getattr(task, name)
            for name in ("columns", "labels", "metrics", "validation", "test", "others")
        },
        # Decided where the run could see its files; elsewhere a path may look like a hub ID.
        "on_hub": {
            name: config[name] != "demo" and not Path(config[name]).exists()
            for name in ("model_name_or_path", "dataset_name")
        },
        "base_card": card_metadata(config["model_name_or_path"], provenance["model_revision"]),
        "rows_by_length": {int(length): int(counts[length]) for length in np.flatnonzero(counts)},
        "padding": dict(padding),
        "texts": {
            row: [shorten(rows[row][name], config["max_length"]) for name in task.columns]
            for row in shown
        },
    }
    with writing(folder / DATA_FILE):
        (folder / DATA_FILE).parent.mkdir(exist_ok=True)
    write_json(folder / DATA_FILE, data)
    speed = {key: value for key, value in results.items() if key.startswith(("train_", "sec"))}
    write_json(folder / PROVENANCE_FILE, {**provenance, **speed})
    write_json(folder / RESULTS_FILE, results)


def write_report(*folders: Path) -> None:
    """Write report/ and the model card of finished runs, from their output folders alone.

    All folders are read before anything is written.

    Raises:
        InputError: a folder holds no finished run, is damaged, or cannot be written.
    """
    # Matplotlib and Jinja take seconds to import, which no run should start with.
    from lib.report.card import eval_results, model_card
    from lib.report.page.render import write_page

    for run in [read_finished_run(folder) for folder in folders]:
        plots = write_page(run)
        write_text(run.folder / CARD_FILE, model_card(run, plots))
        path = run.folder / EVAL_RESULTS_FILE
        if entries := eval_results(run):
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            write_text(path, entries)
        else:
            path.unlink(missing_ok=True)


def provenance(
    config: Mapping[str, Any], splits: Splits, model: PreTrainedModel, accelerator: Accelerator
) -> dict[str, Any]:
    """Return where a run comes from: command, code, libraries, data, model and machine.

    `data_fingerprint` is the SHA-256 of the rows that decide the weights and which are best.
    """
    name, revision = config["model_name_or_path"], config["model_revision"]
    device = device_name(accelerator.device)
    weights, names = class_weights(config["class_weights"], splits), splits.task.labels
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(),
        "data": splits.source,
        "data_fingerprint": dataclasses.replace(splits, test={}).fingerprint(),
        "num_rows": {split: len(rows) for split, rows in splits.all.items()},
        "model": name,
        "model_revision": revision_of(name, revision),
        "dataset_revision": config["dataset_revision"],
        "num_parameters": sum(weights.numel() for weights in model.parameters()),
        "num_trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "frozen": [name for name, weights in model.named_parameters() if not weights.requires_grad],
        "device": f"{accelerator.num_processes} x {device}",
        "precision": precision(accelerator),
        "label_weights": {} if weights is None else dict(zip(names, weights.tolist(), strict=True)),
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `-dirty` if files changed; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
