"""Output folders of runs that never ran, as `lib.compare` reads them."""

import json

import numpy as np
import yaml

from lib.data.tasks import TASKS
from lib.report.predictions import write_predictions
from lib.training import metrics

LABELS = np.array([1, 1, 1, 0, 0, 1, 1, 1, 0, 0])


def wrong_in(*rows, labels=LABELS):
    """Predictions that are wrong in some rows only."""
    predictions = labels.copy()
    predictions[list(rows)] = 1 - predictions[list(rows)]
    return predictions


def make_run(folder, predictions, *, labels=LABELS, seed=0, fingerprint="f" * 64, **config):
    """Write what `lib.compare` reads of a finished run, as a run writes it."""
    (folder / "predictions").mkdir(parents=True)
    config = {"task_name": "mrpc", "max_predict_samples": None, "seed": seed, **config}
    task = TASKS[config["task_name"]]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = metrics.compute(task.metrics, predictions, labels)
    results |= {"loss": 1 - results[task.metrics[0]], "num_rows": len(labels)}
    results[f"{task.metrics[0]}_ci95"] = [0.1, 0.9]
    if task.labels and np.ptp(predictions) == 0:
        results["collapsed_to"] = task.labels[predictions[0]]
    results = {f"eval_{name}": value for name, value in results.items()}
    (folder / "all_results.json").write_text(json.dumps(results))
    manifest = {"data_fingerprint": fingerprint, "train_examples_per_second": 10.0 + seed}
    manifest["num_rows"] = {"train": 40, "validation": len(labels)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    logits = predictions[:, None].astype(float)
    if task.labels:
        # Probabilities that differ from seed to seed, as those of runs do.
        logits = np.eye(len(task.labels))[predictions] * (1 + 0.01 * seed)
    write_predictions(
        folder / "predictions" / f"{task.validation[0]}.jsonl", logits, labels, task.labels
    )
    return str(folder)
