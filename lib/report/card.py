"""The model card, README.md: what the model is, how well it does, and how to use it."""

import re
from collections.abc import Mapping

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from lib.report.finished_run import FinishedRun, Score

GLUE = "nyu-mll/glue"


def model_card(run: FinishedRun, plots: Mapping[str, str]) -> str:
    """A model card in Markdown, whose metadata hold the scores as a `model-index`.

    Args:
        plots: title and path, relative to the card, of each plot.
    """
    task_name = run.config["task_name"]
    about = f"`{run.data}`" + (f" ({task_name})" if task_name else "")
    num_train_rows = len(run.lengths)
    splits = "\n\n".join(_scores_of(run, split) for split in run.num_rows)
    pictures = "\n\n".join(f"![{title}]({path})" for title, path in plots.items())
    settings = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
    return f"""---
{_metadata(run).to_yaml()}
---

# {run.name}

`{run.base_model}` fine-tuned on {about}, {num_train_rows:,} rows, by `train_mrpc.py`.

```python
{_snippet(run)}
```

## Results

{splits}

The intervals are bootstrapped over the rows. They cover neither the choice of the best update,
which was made on the {run.split} rows, nor another seed.

## Plots

`report/index.html` shows these and the worst mistakes on one page.

{pictures}

## Training

| setting | value |
|---|---|
{settings}

Trained on {run.provenance["device"]}: {run.cost}.{_commits(run)} `config.yaml` holds the
whole configuration, `manifest.json` the library versions, the commit and the fingerprint of the
data.
"""


def _commits(run: FinishedRun) -> str:
    """A sentence on the commits of what came from the hub."""
    commits = {
        run.base_model: run.provenance["model_revision"],
        run.data: run.config["dataset_revision"],
    }
    named = [f"`{name}` at commit `{commit}`" for name, commit in commits.items() if commit]
    return f" From the hub: {', '.join(named)}." if named else ""


def _snippet(run: FinishedRun) -> str:
    """Python that loads the model from the folder of the card and classifies a text or a pair."""
    options = f"truncation=True, max_length={run.config['max_length']}"
    if run.config["trust_remote_code"]:
        options += ", trust_remote_code=True"
    pair = ', "text_pair": "On Monday, he said so."' if len(run.task.columns) == 2 else ""
    return f"""from transformers import pipeline

# Run this in the folder of this file, or replace "." by its path or by the model's name on the hub.
classify = pipeline("text-classification", ".", {options})
print(classify({{"text": "He said so on Monday."{pair}}}))"""


def _scores_of(run: FinishedRun, split: str) -> str:
    """The table of a split, below the name of its data."""
    rows = []
    for score in run.scores:
        if score.split == split:
            interval = (
                f"{score.interval[0]:.4f} to {score.interval[1]:.4f}" if score.interval else ""
            )
            metric = _escape(run.metric_name(score.metric))
            rows.append(f"| {metric} | {score.value:.4f} | {interval} |")
    return (
        f"{split.capitalize()}, {run.num_rows[split]:,} rows of `{run.data_of(split)}`:\n\n"
        "| metric | value | 95% interval |\n|---|---|---|\n" + "\n".join(rows)
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$])", r"\\\1", text)


def eval_results(run: FinishedRun) -> str:
    """The scores in the format of `.eval_results/*.yaml`; empty if the data are not on the hub."""
    if not _data_on_hub(run):
        return ""
    entries = [
        EvalResultEntry(
            dataset_id=run.data,
            dataset_revision=run.config["dataset_revision"],
            task_id=run.config["task_name"] or "default",
            value=score.value,
            notes=f"{run.metric_name(score.metric)}, {score.split} split",
        )
        for score in _reported(run)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _data_on_hub(run: FinishedRun) -> bool:
    return run.is_one_source and run.on_hub["dataset_name"]


def _reported(run: FinishedRun) -> list[Score]:
    """The scores that others compare; the loss is none of them."""
    return [score for score in run.scores if score.metric != "loss"]


def _metadata(run: FinishedRun) -> ModelCardData:
    metrics = dict.fromkeys(score.metric for score in _reported(run))
    metrics.pop("combined_score", None)  # a mean of the others, which the hub does not know
    return ModelCardData(
        model_name=run.name,
        base_model=run.base_model if run.on_hub["model_name_or_path"] else None,
        datasets=[run.data] if _data_on_hub(run) else None,
        language=run.base_card.get("language", "en" if run.data == GLUE else None),
        license=run.base_card.get("license"),
        metrics=list(metrics),
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["text-classification", "accelerate"],
        eval_results=[_eval_result(run, score) for score in _reported(run)],
        ignore_metadata_errors=False,
    )


def _eval_result(run: FinishedRun, score: Score) -> EvalResult:
    """An entry of the model-index, which names the data that the score was measured on."""
    task_name = run.config["task_name"]
    on_hub = _data_on_hub(run)
    return EvalResult(
        task_type="text-classification",
        dataset_type=run.data if on_hub else "custom",
        dataset_name=f"GLUE {task_name}" if run.data == GLUE else run.data_of(score.split),
        dataset_config=task_name if on_hub else None,
        dataset_revision=run.config["dataset_revision"] if on_hub else None,
        dataset_split=score.split,
        metric_type=score.metric,
        metric_name=run.metric_name(score.metric),
        metric_value=score.value,
    )
