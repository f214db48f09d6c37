"""The output folder of a run that never ran, with made-up figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.data.tasks import Task
from lib.report.finished_run import OTHERS, PROVENANCE, SETTINGS, SOURCES
from lib.report.results import write_report, write_results
from lib.training import metrics

TEXTS = ("<script>alert(1)</script> & one", "<b>two</b>")


def write_finished_run(
    folder: Path,
    task: Task,
    predictions: Sequence[Mapping[str, Any]],
    *,
    texts: Sequence[str] = TEXTS,
    test_rows: int = 0,
    **config: Any,
) -> Path:
    """Write what a run of one evaluation leaves, but for its model.

    Args:
        predictions: the lines of the validation split's file under predictions/.
        texts: of every validation row.
        test_rows: how many labeled test rows were scored.
        config: fields of config.yaml that are not empty.
    """
    folder.mkdir(exist_ok=True)
    known = {"max_length": 64, "seed": 1, "model_name_or_path": "org/model", "dataset_name": "demo"}
    fields = dict.fromkeys((*SETTINGS, *SOURCES, *OTHERS)) | known | config
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    names = [name for name in metrics.metric_names(task.metrics) if name != "loss"]
    scores = {f"eval_{name}": 0.75 for name in names} | {"eval_loss": 0.5}
    logged = {"loss": 0.7, "learning_rate": 1e-4, "examples_per_second": 20.0}
    log = [{"update": 1, **logged}, {"update": 2, **logged}, {"update": 2, **scores}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "predictions").mkdir(exist_ok=True)
    (folder / "predictions" / f"{task.validation[0]}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in predictions)
    )
    results = {
        **scores,
        **{f"eval_{name}_ci95": [0.7, 0.8] for name in names},
        "eval_num_rows": len(predictions),
        "train_seconds": 61.4,
        "train_examples_per_second": 20.0,
        "train_model_tflops_per_second": 0.01234,
        "train_peak_resident_memory_gib": 1.5,
        "best_update": 2,
        "num_updates": 2,
    }
    if test_rows:
        results |= {f"test_{name}": 0.5 for name in names} | {"test_loss": 0.9}
        results |= {f"test_{name}_ci95": [0.4, 0.6] for name in names}
        results["test_num_rows"] = test_rows
    provenance = dict.fromkeys(PROVENANCE, "x")
    provenance |= {"command": "train <b>", "versions": {"torch": "2"}, "model_revision": None}
    write_results(
        folder,
        results,
        task=task,
        provenance=provenance,
        rows=[dict(zip(task.columns, texts, strict=False))] * len(predictions),
        lengths=[3, 8, 5],
        padding={"fixed length": 0.4, "plain dynamic": 0.3, "this run": 0.1},
    )
    write_report(folder)
    return folder
