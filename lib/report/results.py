"""What a finished run leaves beside the model: predictions, manifest, report, model card."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from numpy.typing import NDArray

from lib.checkpoints.output import (
    MANIFEST_FILE,
    RESULTS_FILE,
    replacing,
    write_json,
    write_text,
    writing,
)
from lib.data.tasks import Task
from lib.training.evaluation import Predictions, score
from lib.training.metrics import confidence_intervals, has_labels, predictions_of, probabilities_of

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


def write_predictions(
    path: Path, logits: NDArray[Any], labels: NDArray[Any], names: Sequence[str]
) -> None:
    """One JSON line per row: index, prediction, the probability of each class, label if known.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression, whose prediction is the score.
        names: of the classes; empty for a regression.
    """
    predictions = predictions_of(logits)
    probabilities = probabilities_of(logits) if names else None
    labelled = has_labels(labels)

    def lines() -> Iterator[str]:
        for row, prediction in enumerate(predictions):
            line: dict[str, Any] = {"index": row}
            if probabilities is None:
                line["prediction"] = float(prediction)
            else:
                line["prediction"] = names[prediction]
                line["probabilities"] = dict(zip(names, probabilities[row].tolist(), strict=True))
            if labelled:
                line["label"] = names[int(labels[row])] if names else float(labels[row])
            yield json.dumps(line, ensure_ascii=False) + "\n"

    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(lines())


def write_submission(
    path: Path, logits: NDArray[Any], names: Sequence[str], *, submits_names: bool
) -> None:
    """The file that gluebenchmark.com takes: `index<TAB>prediction`, in the order of the rows."""
    predictions = predictions_of(logits)
    if not names:
        values = [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]  # STS-B's range
    elif submits_names:
        values = [names[number] for number in predictions]
    else:
        values = [str(number) for number in predictions]
    rows = (f"{index}\t{value}\n" for index, value in enumerate(values))
    write_text(path, "index\tprediction\n" + "".join(rows))


def write_split(
    folder: Path, split: str, predictions: Predictions, task: Task, *, seed: int
) -> dict[str, Any]:
    """Write the predictions of a split; return its scores with intervals, if it is labelled.

    Returns:
        The task's metrics and `loss`, each metric's 95% interval as `<metric>_ci95`, `num_rows`,
        and `collapsed_to` where every row is predicted as one class.
    """
    target = folder / "predictions"
    with writing(target):
        target.mkdir(exist_ok=True)
    logits, labels = predictions.logits, predictions.labels
    write_predictions(target / f"{split}.jsonl", logits, labels, task.labels)
    if split in task.test and task.submissions:
        name = task.submissions[task.test.index(split)]
        write_submission(target / name, logits, task.labels, submits_names=task.submits_names)
    if not has_labels(labels):
        return {"num_rows": len(labels)}
    evaluated = score(predictions, task)
    intervals = confidence_intervals(task.metrics, predictions_of(logits), labels, seed=seed)
    results: dict[str, Any] = dict(evaluated.scores)
    results |= {f"{name}_ci95": list(interval) for name, interval in intervals.items()}
    results["num_rows"] = len(labels)
    if evaluated.collapsed_to is not None:
        results["collapsed_to"] = evaluated.collapsed_to
    return results


def facts(**more: Any) -> dict[str, Any]:
    """Where a run comes from: the command, the code, its libraries, and `more`."""
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(Path(__file__).parent),
        "versions": software(),
        **more,
    }


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    *,
    task: Task,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    padding: Mapping[str, float],
) -> None:
    """Write all_results.json, manifest.json (the `facts` and the speed), report and model card.

    Args:
        rows, lengths, padding: as for `report_page.write_page`.
    """
    # Matplotlib: a second or two that no run should start with.
    from lib.report.page import write_page

    write_json(folder / RESULTS_FILE, results)
    speed = {key: value for key, value in results.items() if key.startswith(("train_", "sec"))}
    manifest = {**facts, **speed}
    write_json(folder / MANIFEST_FILE, manifest)
    plots = write_page(
        folder,
        task=task,
        results=results,
        manifest=manifest,
        config=config,
        rows=rows,
        lengths=lengths,
        padding=padding,
    )
    write_text(
        folder / "README.md",
        model_card(
            name=folder.resolve().name,
            base_model=config["model_name_or_path"],
            dataset=facts["data"],
            task_name=config["task_name"],
            num_texts=len(task.columns),
            splits=task.validation,
            results=results,
            config=config,
            device=facts["device"],
            plots=plots,
        ),
    )


def software() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's results."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit(folder: Path) -> str | None:
    """The commit that the script was run from, with `-dirty` for changes; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def model_card(
    *,
    name: str,
    base_model: str,
    dataset: str,
    task_name: str | None,
    num_texts: int,
    splits: Sequence[str],
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    device: str,
    plots: Mapping[str, str],
) -> str:
    """A model card in Markdown, whose metadata hold the results as a `model-index`.

    Args:
        task_name: GLUE task; None for files of the user's own.
        num_texts: 1 for single sentences, 2 for pairs.
        splits: that the model was evaluated on; MNLI has two.
        results: as in all_results.json.
        config: the resolved configuration.
        plots: title and path, relative to the card, of each plot.
    """
    scores = []
    for key, value in results.items():
        if key.startswith("eval_") and isinstance(value, float):
            second = len(splits) > 1 and key.startswith("eval_mm_")
            metric = key.removeprefix("eval_mm_" if second else "eval_")
            scores.append((splits[second], metric, value, results.get(f"{key}_ci95")))
    of_glue = dataset == "nyu-mll/glue"
    base = Path(base_model).name if Path(base_model).exists() else base_model
    data = ModelCardData(
        model_name=name,
        base_model=base_model if base == base_model else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["text-classification", "accelerate"],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset if of_glue else "custom",
                dataset_name=f"GLUE {task_name}" if of_glue else Path(dataset).name,
                dataset_config=task_name if of_glue else None,
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for split, metric, value, _ in scores
        ],
        ignore_metadata_errors=False,
    )
    rows = []
    for split, metric, value, interval in scores:
        shown = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        rows.append(f"| {split} | {metric} | {value:.4f} | {shown} |")
    length = "num_train_epochs" if config["max_train_steps"] is None else "max_train_steps"
    warmup = "warmup_ratio" if config["num_warmup_steps"] is None else "num_warmup_steps"
    names: tuple[str, ...] = ("learning_rate", "layerwise_lr_decay", "train_batch_size")
    names += (length, warmup)
    names += ("lr_scheduler_type", "weight_decay", "max_grad_norm", "label_smoothing")
    names += ("max_length", "seed")
    settings = "\n".join(f"| {key} | {config[key]} |" for key in names)
    pair = ', "text_pair": "On Monday, he said so."' if num_texts == 2 else ""
    about = f"`{dataset}` ({task_name})" if task_name else f"`{dataset}`"
    table = "\n".join(rows)
    pictures = "\n\n".join(f"![{title}]({path})" for title, path in plots.items())
    return f"""---
{data.to_yaml()}
---

# {name}

`{base}` fine-tuned on {about} by `train_mrpc.py`.

```python
from transformers import pipeline

classify = pipeline("text-classification", "{name}")
classify({{"text": "He said so on Monday."{pair}}})
```

## Results

| split | metric | value | 95% interval |
|---|---|---|---|
{table}

The intervals are bootstrapped over the validation rows; they do not cover the choice of the best
update on these rows, nor another seed.

## Plots

`report/index.html` shows these with the most confident mistakes, in one file.

{pictures}

## Training

| setting | value |
|---|---|
{settings}

Trained on {device}. `config.yaml` holds the whole configuration, `manifest.json` the versions,
the commit and the fingerprint of the data.
"""
