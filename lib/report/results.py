"""The results of a finished run, and the report and model card made from them."""

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lib.checkpoints.output import (
    MANIFEST_FILE,
    RESULTS_FILE,
    read_config,
    write_json,
    write_text,
    writing,
)
from lib.data.tasks import Task
from lib.report import predictions
from lib.report.finished_run import DATA_FILE, read_finished_run
from lib.report.page.mistakes import shorten, worst_rows

CARD_FILE = "README.md"

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


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    *,
    task: Task,
    provenance: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
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
            for name in ("columns", "labels", "metrics", "validation", "test")
        },
        # Decided where the run could see its files; elsewhere a path may look like a hub ID.
        "on_hub": {
            name: config[name] != "demo" and not Path(config[name]).exists()
            for name in ("model_name_or_path", "dataset_name")
        },
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
    write_json(folder / MANIFEST_FILE, {**provenance, **speed})
    write_json(folder / RESULTS_FILE, results)


def write_report(*folders: Path) -> None:
    """Write report/ and the model card of finished runs, from their output folders alone.

    All folders are read before anything is written.

    Raises:
        InputError: a folder holds no finished run, is damaged, or cannot be written.
    """
    # Matplotlib and Jinja take seconds to import, which no run should start with.
    from lib.report.card import model_card
    from lib.report.page.render import write_page

    for run in [read_finished_run(folder) for folder in folders]:
        plots = write_page(run)
        write_text(run.folder / CARD_FILE, model_card(run, plots))


def provenance(**more: Any) -> dict[str, Any]:
    """Where a run comes from: its command, commit and library versions, and `more`."""
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(),
        **more,
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
