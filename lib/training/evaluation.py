"""Evaluate a model on a split: every row exactly once, on any number of processes."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import pad_across_processes
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from lib.data.batching import FillingCollator, MicroBatches, plan_evaluation
from lib.data.splits import Splits
from lib.data.tasks import Task
from lib.data.tokenizing import row_lengths
from lib.distributed.collectives import from_main_process
from lib.training import metrics


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The model's logits for a split, in the order of its rows.

    `logits` is (rows, classes) in float32 and `labels` (rows,).
    """

    logits: NDArray[np.float32]
    labels: NDArray[Any]


def evaluation_loaders(
    tokenized: Splits, batch_size: int, collator: FillingCollator, accelerator: Accelerator
) -> dict[str, DataLoader[Any]]:
    """Return a loader of every row of each validation and test split, by split.

    Args:
        batch_size: most rows of a batch.
    """
    loaders = {}
    for split, rows in (tokenized.validation | tokenized.test).items():
        plan = plan_evaluation(
            row_lengths(rows), batch_size=batch_size, num_processes=accelerator.num_processes
        )
        loaders[split] = DataLoader(
            rows,
            batch_sampler=MicroBatches({0: plan}.__getitem__),
            collate_fn=collator.resized(batch_size),
            pin_memory=accelerator.device.type == "cuda",
        )
    return loaders


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Iterable[dict[str, torch.Tensor]],
    accelerator: Accelerator,
    between_batches: Callable[[], None],
) -> Predictions:
    """Predict every row of `loader` and return all rows on every process.

    Each process collects its own rows. One gather at the end joins them and drops padding rows,
    whose row number is -1; `gather_for_metrics` would keep them. Leaves the model in evaluation
    mode.
    """
    model.eval()
    rows, logits, labels = [], [], []
    for batch in loader:
        between_batches()
        rows.append(batch.pop("row"))
        labels.append(batch.pop("labels"))
        with accelerator.autocast():
            # Copy: CUDA graphs write the logits of the next batch to the same memory.
            logits.append(model(**batch).logits.to(torch.float32, copy=True))
    # Collectives need the same shape on all processes: pad to the largest number of rows.
    gathered = [
        accelerator.gather(pad_across_processes(torch.cat(parts), pad_index=-1)).cpu().numpy()
        for parts in (rows, logits, labels)
    ]
    order = np.argsort(gathered[0], kind="stable")
    order = order[gathered[0][order] >= 0]
    found = gathered[0][order]
    assert (found == np.arange(len(found))).all(), "a row is missing or was evaluated twice"
    return Predictions(gathered[1][order], gathered[2][order])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The task's metrics and `loss` on a split, and the class if all rows are predicted as one."""

    scores: dict[str, float]
    collapsed_to: str | None

    @property
    def remark(self) -> str:
        """A warning for the user; empty if there is none."""
        if self.collapsed_to is None:
            return ""
        return f"every row is predicted as {self.collapsed_to!r}: the model has collapsed"


def score(predictions: Predictions, task: Task, others: Sequence[str]) -> Evaluation:
    """Compute the task's metrics, through its `evaluate.Metric`, `others`, and the mean loss."""
    answers = metrics.predictions_of(predictions.logits)
    scores = metrics.glue_metric(task.metrics, regression=not task.labels).compute(
        predictions=answers, references=predictions.labels
    )
    for name in others:
        inputs = metrics.answers_of(predictions.logits, name)
        scores |= metrics.compute([name], inputs, predictions.labels)
    loss = metrics.mean_loss(predictions.logits, predictions.labels)
    collapsed = metrics.collapsed_class(answers) if task.labels else None
    return Evaluation(
        {**scores, "loss": loss}, None if collapsed is None else task.labels[collapsed]
    )


def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, torch.Tensor]],
    accelerator: Accelerator,
    task: Task,
    between_batches: Callable[[], None],
) -> Evaluation:
    """Predict and score a split; the main process computes the scores, all get them."""
    predictions = predict(model, loader, accelerator, between_batches)
    return from_main_process(accelerator, partial(score, predictions, task, task.others))
