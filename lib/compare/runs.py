"""Reading finished runs, and refusing sets of runs that cannot be compared."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.checkpoints.run_folder import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    RESULTS_FILE,
    STATUS_FILE,
    read_config,
)
from lib.cli.resuming import FREE_FLAGS
from lib.data.tasks import TASKS, Task, task_of_files
from lib.errors import InputError

# Fields in which runs of one recipe may differ.
NOT_IN_RECIPE = {*FREE_FLAGS, "seed"}


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """The output of a finished run, as far as it is compared.

    `figures` are its evaluation scores and its speeds, `results` all of all_results.json.
    `predictions` and `labels` are (rows,): class numbers, or scores for a regression. `digest` is
    the SHA-256 of the predictions file.
    """

    folder: str
    config: Mapping[str, Any]
    task: Task
    figures: Mapping[str, float]
    results: Mapping[str, Any]
    collapsed_to: str | None
    fingerprint: str
    predictions: NDArray[Any]
    labels: NDArray[Any]
    digest: str


def read_run(folder: Path) -> ScoredRun:
    """Read the run in a folder.

    Raises:
        InputError: there is no run, it is not finished, or its files are damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config = read_config(folder)
    if config is None:
        raise InputError(f"{folder} is not the output folder of a run: it has no {CONFIG_FILE}")
    status = _read_json(folder / STATUS_FILE).get("status", "finished")
    written = (RESULTS_FILE, PROVENANCE_FILE)
    missing = [name for name in written if not (folder / name).exists()]
    if status != "finished" or missing:
        found = f"its status is {status!r}" if status != "finished" else f"it has no {missing[0]}"
        raise InputError(
            f"{folder}: the run is not finished ({found}); run its command again to finish it"
        )
    results, manifest = (_read_json(folder / name) for name in written)
    # Flags alone do not decide these.
    config |= {name: manifest[name] for name in ("precision", "model_revision") if name in manifest}
    task = TASKS.get(config.get("task_name") or "")
    path = folder / "predictions" / f"{task.validation[0] if task else 'validation'}.jsonl"
    classes, predictions, labels, digest = _read_predictions(path)
    figures = {
        name: float(number)
        for source, prefixes in ((results, ("eval_",)), (manifest, ("train_", "sec")))
        for name, number in source.items()
        if name.startswith(prefixes)
        and isinstance(number, int | float)
        and not name.endswith("num_rows")
    }
    return ScoredRun(
        str(folder),
        config,
        task or task_of_files((), classes),
        figures,
        results,
        results.get("eval_collapsed_to"),
        str(manifest.get("data_fingerprint")),
        predictions,
        labels,
        digest,
    )


def _read_predictions(path: Path) -> tuple[tuple[str, ...], NDArray[Any], NDArray[Any], str]:
    """Read the names of the classes, the predictions, the labels, and the digest of the file.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        classes = tuple(lines[0].get("probabilities", ()))
        number = {name: number for number, name in enumerate(classes)}.__getitem__
        predictions, labels = (
            np.array([number(line[key]) if classes else float(line[key]) for line in lines])
            for key in ("prediction", "label")
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not have a prediction and a label for every row: {error!r}"
        ) from error
    return classes, predictions, labels, hashlib.sha256(content).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file gives an empty one.

    Raises:
        InputError: the file cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} was not written by a run: it is not a JSON object")
    return content


def check_comparable(sets: Sequence[Sequence[ScoredRun]]) -> None:
    """Check that all runs are scored on the same rows, and that no run is counted twice.

    Raises:
        InputError: it names the two runs.
    """
    runs = [run for one_set in sets for run in one_set]
    for one, other in itertools.combinations(runs, 2):
        if Path(one.folder).resolve() == Path(other.folder).resolve():
            raise InputError(f"{other.folder} is given twice")
        reason = _data_mismatch(one, other)
        if reason:
            raise InputError(
                f"{other.folder} was not evaluated on the data of {one.folder} ({reason}): compare "
                "runs on the same data"
            )
    for one_set in sets:
        for one, other in itertools.combinations(one_set, 2):
            if one.digest == other.digest:
                raise InputError(
                    f"{other.folder} has exactly the predictions of {one.folder}: it is a copy of "
                    "the same run, and says nothing about other seeds"
                )
            changed = config_differences(one.config, other.config).keys() - NOT_IN_RECIPE
            if one.config.get("seed") == other.config.get("seed") and not changed:
                raise InputError(
                    f"{other.folder} has the recipe and the seed of {one.folder}, and says nothing "
                    "about other seeds: give one run of each seed"
                )


def _data_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    """Why two runs are not of the same data, or None if they are."""
    mismatch = rows_mismatch(one, other)
    if mismatch is None and one.fingerprint != other.fingerprint:
        return f"data_fingerprint {other.fingerprint[:8]} and {one.fingerprint[:8]}"
    return mismatch


def rows_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    """Why two runs are not scored on the same rows, or None if they are."""
    tasks = [run.config.get("task_name") for run in (one, other)]
    if tasks[0] != tasks[1]:
        return f"tasks {tasks[0]} and {tasks[1]}"
    if one.task.labels != other.task.labels:
        return "different classes"
    if len(one.labels) != len(other.labels):
        return f"{len(other.labels)} and {len(one.labels)} validation rows"
    if (one.labels != other.labels).any():
        return f"row {np.flatnonzero(one.labels != other.labels)[0]} has another label"
    return None


def config_differences(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The fields that both configurations have, with different values."""
    return {
        name: (value, other[name])
        for name, value in one.items()
        if name in other and other[name] != value
    }
