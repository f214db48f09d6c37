"""Charts, predictions and the model of a finished run on wandb."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.tracking.wandb_run import without_home
from lib.training.curves import calibration_bins
from lib.training.evaluation import Predictions
from lib.training.metrics import (
    has_labels,
    predictions_of,
    probabilities_of,
    row_losses,
)


def log_predictions(
    run: Any,
    *,
    predictions: Predictions,
    texts: Mapping[str, Sequence[str]],
    names: Sequence[str],
) -> None:
    """Log confusion matrix, precision-recall, ROC and calibration curves, and a table of the rows.

    The table starts with the rows of highest loss.

    Args:
        texts: the text columns of the rows.
        names: of the classes; empty for a regression, which gets the table alone.
    """
    import wandb

    logits, labels = predictions.logits, predictions.labels
    if not has_labels(labels):
        return
    predicted = predictions_of(logits)
    losses = row_losses(logits, labels)
    shown: dict[str, Any] = {}
    columns: list[str | int] = ["row", *texts, "label", "prediction", "loss"]
    values: list[Sequence[Any]] = [range(len(labels)), *texts.values()]
    if names:
        probabilities = probabilities_of(logits)
        shown |= {
            "eval/confusion_matrix": wandb.plot.confusion_matrix(
                y_true=labels.tolist(), preds=predicted.tolist(), class_names=list(names)
            ),
            "eval/precision_recall": wandb.plot.pr_curve(
                labels.tolist(), probabilities.tolist(), list(names)
            ),
            "eval/roc": wandb.plot.roc_curve(labels.tolist(), probabilities.tolist(), list(names)),
            "eval/calibration": _calibration(probabilities, labels),
        }
        values += [[names[label] for label in labels], [names[number] for number in predicted]]
        values += [losses.tolist(), probabilities.max(axis=1).tolist()]
        columns.append("probability")
    else:
        values += [labels.tolist(), predicted.tolist(), losses.tolist()]
    rows = list(zip(*values, strict=True))
    hardest = [list(rows[row]) for row in np.argsort(-losses, kind="stable")]
    shown["eval/pairs"] = wandb.Table(columns=columns, data=hardest)
    run.log(shown)


def _calibration(probabilities: Any, labels: Any) -> Any:
    """Accuracy against confidence, bin by bin."""
    import wandb

    confidence, accuracy, counts = calibration_bins(probabilities, labels)
    data = np.stack([confidence, accuracy], axis=1)[counts > 0].tolist()
    table = wandb.Table(columns=["confidence", "accuracy"], data=data)
    return wandb.plot.line(table, "confidence", "accuracy", title="Calibration")


def log_model(
    run: Any, *, folder: Path, results: Mapping[str, Any], provenance: Mapping[str, Any], how: str
) -> None:
    """Log the best model as an artifact.

    Args:
        results, provenance: go into the artifact's metadata.
        how: "file" uploads the files, "reference" records their paths, "none" does nothing.
    """
    import wandb

    if how == "none":
        return

    metadata = {name: without_home(value) for name, value in {**provenance, **results}.items()}
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        if how == "file":
            artifact.add_file(str(path), name)
        else:
            artifact.add_reference(path.resolve().as_uri(), name)
    run.log_artifact(artifact)


def log_results(run: Any, *, results: Mapping[str, Any]) -> None:
    """Write the final scores and their intervals to the summary of the run."""
    for name, value in results.items():
        kind, _, rest = name.partition("_")
        shown = f"{kind}/{rest}" if kind in ("eval", "test") else name
        if name.endswith("_ci95"):
            run.summary[f"{shown}_low"], run.summary[f"{shown}_high"] = value
        else:
            run.summary[f"final/{shown}"] = value
