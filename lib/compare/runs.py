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
NOT_IN_RECIPE = {*FREE_FLAGS, "seed", "fold"}


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """The output of a finished run, as far as it is compared.

    `figures` are its evaluation scores and its speeds, `results` all of all_results.json.
    `predictions` and `labels` are (rows,): class numbers, or scores for a regression. `digest` is
    the SHA-256 of the predictions file. `num_train` counts the training rows, where the validation
    rows were cut from them; else it is None.
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
    num_train: int | None = None

    @property
    def cut(self) -> tuple[Any, Any]:
        """What, beside the recipe, decides the rows that a run validates on."""
        return self.config.get("seed"), self.config.get("fold")


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
    path = folder / "predictions" / "validation.jsonl"
    if task and not path.exists():  # MNLI's own split has another name
        path = path.with_name(f"{task.validation[0]}.jsonl")
    is_cut = config.get("validation_share") is not None or config.get("folds") is not None
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
        manifest["num_rows"]["train"] if is_cut else None,
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

    Runs whose validation rows were cut from the training rows need the same rows only in pairs.

    Raises:
        InputError: it names the two runs.
    """
    runs = [run for one_set in sets for run in one_set]
    for one, other in itertools.combinations(runs, 2):
        if Path(one.folder).resolve() == Path(other.folder).resolve():
            raise InputError(f"{other.folder} is given twice")
        cuts_differ = None not in (one.num_train, other.num_train) and one.cut != other.cut
        reason = _task_mismatch(one, other) or (None if cuts_differ else _data_mismatch(one, other))
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
            if one.cut == other.cut and not changed:
                raise InputError(
                    f"{other.folder} has the recipe and the seed of {one.folder}, and says nothing "
                    "about other seeds: give one run of each seed"
                )
    if len(sets) == 2 and all(run.num_train is not None for run in runs):
        _check_pairs(*sets)


def _check_pairs(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> None:
    """Check that each run has one run of the other set with the same validation rows."""
    for runs, others in ((a, b), (b, a)):
        for run in runs:
            partners = [other.folder for other in others if other.cut == run.cut]
            if len(partners) != 1:
                seed, fold = run.cut
                which = f"seed {seed}" if fold is None else f"seed {seed}, fold {fold}"
                raise InputError(
                    f"{run.folder} ({which}) validates on rows of its own, and the other set has "
                    f"{len(partners)} runs on them: give one of each seed and fold in both sets"
                )


def _task_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    """Why two runs do not do the same task, or None if they do."""
    tasks = [run.config.get("task_name") for run in (one, other)]
    if tasks[0] != tasks[1]:
        return f"tasks {tasks[0]} and {tasks[1]}"
    if one.task.labels != other.task.labels:
        return "different classes"
    if (one.num_train is None) != (other.num_train is None):
        return "the validation rows of one of them were cut from its training rows"
    totals = [(run.num_train or 0) + len(run.labels) for run in (one, other)]
    if one.num_train is not None and totals[0] != totals[1]:
        return f"{totals[1]:,} and {totals[0]:,} rows to cut validation rows from"
    return None


def _data_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    """Why two runs of a task are not of the same data, or None if they are."""
    mismatch = _labels_mismatch(one, other)
    if mismatch is None and one.fingerprint != other.fingerprint:
        return f"data_fingerprint {other.fingerprint[:8]} and {one.fingerprint[:8]}"
    return mismatch


def _labels_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    if len(one.labels) != len(other.labels):
        return f"{len(other.labels)} and {len(one.labels)} validation rows"
    if (one.labels != other.labels).any():
        return f"row {np.flatnonzero(one.labels != other.labels)[0]} has another label"
    return None


def rows_mismatch(one: ScoredRun, other: ScoredRun) -> str | None:
    """Why two runs are not scored on the same rows, or None if they are."""
    return _task_mismatch(one, other) or _labels_mismatch(one, other)


def config_differences(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The fields that both configurations have, with different values."""
    return {
        name: (value, other[name])
        for name, value in one.items()
        if name in other and other[name] != value
    }
