"""A finished run, as its output folder tells it."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lib.checkpoints.run_folder import CONFIG_FILE, METRICS_FILE, PROVENANCE_FILE, RESULTS_FILE
from lib.data.files.paths import shown
from lib.data.tasks import Task
from lib.errors import InputError
from lib.report import predictions
from lib.training.metrics import (
    OF_CLASSIFIERS,
    best_metric_name,
    display_name,
    metric_names,
    other_metrics,
)

Array = NDArray[Any]

FOLDER = "report"
DATA_FILE = f"{FOLDER}/data.json"
PAGE_FILE = f"{FOLDER}/index.html"

AGAIN = "run the command of this run again"

# Characters of the columns of scores on the terminal.
SPLIT_WIDTH, METRIC_WIDTH = 12, 24

# What the page and the card show of config.yaml.
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "num_warmup_steps",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "max_length",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing",
    "class_weights",
    "seed",
)
SOURCES = ("model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file")
OTHERS = ("task_name", "metric_for_best_model", "trust_remote_code", "dataset_revision")

# Figures of `Meter.overall`: name, format and unit.
COSTS = (
    ("seconds", ",.0f", "s"),
    ("examples_per_second", ",.1f", "examples/s"),
    ("model_tflops_per_second", ".3g", "TFLOP/s"),
    ("flops_utilization", ".1%", "of the published peak rate"),
    ("peak_device_memory_gib", ".2f", "GiB of device memory at the peak"),
    ("peak_resident_memory_gib", ".2f", "GiB of resident memory at the peak"),
)

PROVENANCE = (
    "command",
    "commit",
    "versions",
    "data_fingerprint",
    "num_rows",
    "model_revision",
    "device",
    "precision",
)


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric on a split; `interval` is its 95% interval, which the loss does not have."""

    split: str
    metric: str
    value: float
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the report shows, checked to be complete.

    Attributes:
        task: without what concerns GLUE's submissions.
        config: the fields of config.yaml that are shown.
        provenance: the fields of manifest.json that are shown.
        scores: of the splits with labels, in the order of the task; `num_rows` counts their rows.
        training: columns of the logged updates, `update`, `loss`, `learning_rate`,
            `examples_per_second`; `evaluations` those of the evaluations, `update` and metrics.
        predicted, labels: as `read_predictions` returns them, of the split that chose the model.
        lengths: tokens of each training row, sorted.
        padding: as `batching.padding_shares` returns it.
        costs: of the training, as `Meter.overall` returns them, without `train_`.
        texts: the text columns of the worst rows, by row.
        calibration: as `calibrate` returns it; empty where it fitted nothing.
        on_hub: whether the model and the data set, by the names of their flags, came from the hub.
        base_card: license and language of the base model, where its card states them.
    """

    folder: Path
    task: Task
    config: dict[str, Any]
    provenance: dict[str, Any]
    scores: list[Score]
    num_rows: dict[str, int]
    best_update: int
    num_updates: int
    training: dict[str, list[float]]
    evaluations: dict[str, list[float]]
    predicted: Array
    labels: Array
    lengths: Array
    padding: dict[str, float]
    costs: dict[str, float]
    texts: dict[int, list[str]]
    on_hub: dict[str, bool]
    calibration: dict[str, Any]
    base_card: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def split(self) -> str:
        """The validation split that chose the best model."""
        return self.task.validation[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings to show, without those that another one overrides."""
        overridden = [
            name
            for name, by in (
                ("num_train_epochs", "max_train_steps"),
                ("warmup_ratio", "num_warmup_steps"),
            )
            if self.config[by] is not None
        ]
        shown = {name: self.config[name] for name in SETTINGS if name not in overridden}
        return {
            name: " ".join(value) if isinstance(value, list) else value
            for name, value in shown.items()
            if value is not None
        }

    @property
    def cost(self) -> str:
        """The time, speed, memory and padding of the training, as far as the run measured them."""
        shown = [
            f"{value:{form}} {unit}"
            for name, form, unit in COSTS
            if (value := self.costs.get(name)) is not None
        ]
        return ", ".join([*shown, f"{self.padding['this run']:.1%} of the tokens padding"])

    @property
    def best_metric(self) -> str:
        return self.config["metric_for_best_model"] or best_metric_name(self.task.metrics)

    def metric_name(self, metric: str) -> str:
        """A metric as readers should see it, with the class of F1."""
        return display_name(metric, self.task.labels)

    @property
    def base_model(self) -> str:
        """The model's ID on the hub, or the name of its folder: no directory of the machine."""
        return self._public_name("model_name_or_path")

    @property
    def data(self) -> str:
        """The data set's ID on the hub, or the name of the training file or of the folder."""
        return self._public_name("dataset_name" if self.is_one_source else "train_file")

    @property
    def is_one_source(self) -> bool:
        """True for a data set on the hub or in a folder, False for a file for each split."""
        return self.config["train_file"] is None

    def data_of(self, split: str) -> str:
        """Where the rows of a validation or test split came from, by name."""
        if self.is_one_source:
            return self.data
        name = "test_file" if split in self.task.test else "validation_file"
        # Without a file of their own, validation rows were cut from the training rows.
        return self._public_name(name if self.config[name] else "train_file")

    def _public_name(self, field: str) -> str:
        value = self.config[field]
        if self.on_hub.get(field):
            return str(value)
        # An older version wrote the one file that it took as text.
        return shown([value] if isinstance(value, str) else value)


def read_finished_run(folder: Path) -> FinishedRun:
    """Read an output folder; writes nothing.

    Raises:
        InputError: it holds no finished run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --output_dir of a finished run")
    with _reading(folder / DATA_FILE) as path:
        data = json.loads(path.read_text(encoding="utf-8"))
        task = _task(data)
        counts = {int(length): count for length, count in data["rows_by_length"].items()}
        lengths = np.repeat(list(counts), list(counts.values()))
        texts = {int(row): list(values) for row, values in data["texts"].items()}
    with _reading(folder / RESULTS_FILE) as path:
        results = json.loads(path.read_text(encoding="utf-8"))
        scores, num_rows = scores_of(results, task)
        best_update, num_updates = results["best_update"], results["num_updates"]
        calibration = results.get("calibration", {})
        costs = {
            name.removeprefix("train_"): float(value)
            for name, value in results.items()
            if name.startswith("train_")
        }
    with _reading(folder / CONFIG_FILE) as path:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = {name: content[name] for name in (*SOURCES, *OTHERS)}
        # A run of an earlier version lacks later settings.
        config |= {name: content.get(name) for name in SETTINGS}
    with _reading(folder / PROVENANCE_FILE) as path:
        content = json.loads(path.read_text(encoding="utf-8"))
        provenance = {name: content[name] for name in PROVENANCE}
    with _reading(folder / METRICS_FILE) as path:
        training, evaluations = _log(path, task)
    with _reading(folder / predictions.FOLDER / f"{task.validation[0]}.jsonl") as path:
        predicted, labels = predictions.read_predictions(path, task.labels)
        if len(labels) != num_rows[task.validation[0]]:
            raise ValueError(f"{len(labels)} rows instead of {num_rows[task.validation[0]]}")
    return FinishedRun(
        folder,
        task,
        config,
        provenance,
        scores,
        num_rows,
        best_update,
        num_updates,
        training,
        evaluations,
        predicted,
        labels,
        lengths,
        padding=data["padding"],
        costs=costs,
        texts=texts,
        on_hub=data["on_hub"],
        calibration=calibration,
        base_card=data.get("base_card", {}),
    )


def read_task(folder: Path) -> Task:
    """Read the task of the run in an output folder, without what concerns GLUE's submissions.

    Raises:
        InputError: as `read_finished_run`.
    """
    with _reading(folder / DATA_FILE) as path:
        return _task(json.loads(path.read_text(encoding="utf-8")))


def _task(data: Mapping[str, Any]) -> Task:
    fields: dict[str, Any] = {name: tuple(value) for name, value in data["task"].items()}
    return Task(**fields)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turn whatever a missing or damaged file raises into an error that names the file."""
    try:
        yield path
    except FileNotFoundError as error:
        raise InputError(f"not the output folder of a finished run: no {path}; {AGAIN}") from error
    except (OSError, ValueError, TypeError, AttributeError, LookupError, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{path} is damaged ({reason}); {AGAIN}") from error


def _log(path: Path, task: Task) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The columns `training` and `evaluations` of a `FinishedRun`, from metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        raise ValueError("no evaluation")
    training = {
        name: [line[name] for line in logged]
        for name in ("update", "loss", "learning_rate", "examples_per_second")
    }
    evaluations = {
        name: [line[f"eval_{name}"] for line in evaluated]
        for name in metric_names(task.metrics, task.others)
    }
    return training, evaluations | {"update": [line["update"] for line in evaluated]}


def scores_of(results: Mapping[str, Any], task: Task) -> tuple[list[Score], dict[str, int]]:
    """The scores of all_results.json, and the number of rows of each split that has some."""
    scores, num_rows = [], {}
    for part, splits in (("eval", task.validation), ("test", task.test)):
        # MNLI has two of each: matched and mismatched.
        for prefix, split in zip((part, f"{part}_mm"), splits, strict=False):
            if f"{prefix}_loss" not in results:
                continue  # a test split without labels
            num_rows[split] = results[f"{prefix}_num_rows"]
            for metric in metric_names(task.metrics, other_metrics(task)):
                if metric in OF_CLASSIFIERS and f"{prefix}_{metric}" not in results:
                    continue  # a run of an earlier version
                low_high = None if metric == "loss" else tuple(results[f"{prefix}_{metric}_ci95"])
                scores.append(Score(split, metric, results[f"{prefix}_{metric}"], low_high))
    return scores, num_rows


def final_lines(
    folder: Path, task: Task, scores: Iterable[Score], best_update: int
) -> Iterator[str]:
    """Yield the last lines of a run: its scores with their 95% intervals, and where to look."""
    shown = metric_names(task.metrics, task.others)
    for score in scores:
        if score.metric in shown:
            name = display_name(score.metric, task.labels)
            low_high = score.interval
            between = f"  ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
            yield (f"{score.split:<{SPLIT_WIDTH}}{name:<{METRIC_WIDTH}}{score.value:.4f}{between}")
    yield f"best model, of update {best_update}: {folder}"
    yield f"report: {folder / PAGE_FILE}"
