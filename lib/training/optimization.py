"""AdamW's parameter groups, the learning rate as a function of the update, and the loss."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from lib.data.splits import Splits
from lib.data.tasks import IGNORED
from lib.errors import InputError


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: no weight decay on biases and normalization weights (any vector)."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault(decay, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, kind: str, num_warmup_updates: int, num_updates: int
) -> LambdaLR:
    """Return the schedule of the learning rate, to be stepped once per update.

    Not for `accelerator.prepare`, whose schedulers step once per process.
    """
    schedule = get_scheduler(kind, optimizer, num_warmup_updates, num_updates)
    assert isinstance(schedule, LambdaLR)
    return schedule


def set_learning_rate(schedule: LambdaLR, update: int) -> None:
    """Set the learning rates of the update that follows `update` updates."""
    state = schedule.state_dict()
    rates = [
        float(rate) * factor(update)
        for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**state, "last_epoch": update, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def class_weights(given: Sequence[str], splits: Splits) -> NDArray[np.float64] | None:
    """Return the weight of each class in the loss; None if all rows count alike.

    Args:
        given: "balanced", "none", or a number for each class in the order of the labels. The
            balanced weights are those of scikit-learn, from the training rows: their number over
            that of the classes times that of the rows of the class.

    Raises:
        InputError: the labels are scores, a class has no training row, or there are more or fewer
            numbers than classes.
    """
    if tuple(given) == ("none",):
        return None
    flag, names = f"--class_weights {' '.join(given)}", splits.task.labels
    if not names:
        raise InputError(f"{flag}: the labels are scores (a regression), not classes: leave it out")
    if tuple(given) == ("balanced",):
        counts = np.bincount(_labels(splits), minlength=len(names))
        if not counts.all():
            missing = names[int(counts.argmin())]
            raise InputError(
                f"{flag}: no training row is labeled {missing!r}: give numbers instead"
            )
        return np.asarray(counts.sum() / (len(names) * counts))
    if len(given) != len(names):
        raise InputError(
            f"{flag}: {len(given)} weights for {len(names)} classes: give one for each of "
            f"{', '.join(names)}"
        )
    return np.array(given, dtype=np.float64)


def _labels(splits: Splits) -> NDArray[np.int64]:
    return np.asarray(splits.train.with_format("numpy")["labels"][:])


class Criterion:
    """The loss of an update: a sum over its rows, divided by the total weight of the rows.

    Over the global batch this is torch's `cross_entropy(weight=..., reduction="mean")`, however its
    rows are split.

    Args:
        class_weights: as for the function of this name.
    """

    def __init__(
        self, splits: Splits, given_weights: Sequence[str], label_smoothing: float
    ) -> None:
        weights = class_weights(given_weights, splits)
        self.label_smoothing = label_smoothing
        self.class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.row_weights = None if weights is None else weights[_labels(splits)]

    def sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss of a micro-batch. Args: as for `loss_sum`."""
        if self.class_weights is not None:  # copied to the device once
            self.class_weights = self.class_weights.to(logits.device)
        return loss_sum(logits, labels, self.label_smoothing, self.class_weights)

    def total_weight(self, global_batch: Iterable[NDArray[Any]]) -> float:
        """Return the weight of all rows of an update; their number if all count alike.

        Every process knows the rows and labels of the others, so none has to ask.

        Args:
            global_batch: the training rows of each micro-batch, on all processes.
        """
        if self.row_weights is None:
            return sum(map(len, global_batch))
        return sum(float(self.row_weights[rows].sum()) for rows in global_batch)


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy, or the squared error of a single logit, summed over the rows.

    A sum, so that the loss of an update is the same however its rows are cut into micro-batches.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression; any floating dtype.
        labels: (rows,); rows labeled `IGNORED` do not count.
        class_weights: (classes,); a row counts with the weight of its label, and what smoothing
            spreads over the classes with theirs, as torch defines it.
    """
    logits = logits.float()
    if logits.shape[-1] == 1:
        errors = (logits.squeeze(-1) - labels.float()).square()
        return torch.where(labels == IGNORED, 0.0, errors).sum()
    return nn.functional.cross_entropy(
        logits,
        labels,
        class_weights,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def learning_rate_at(schedule: LambdaLR, update: int) -> float:
    """Return the highest learning rate of the update that follows `update` updates."""
    factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    return max(float(rate) * factor(update) for rate, factor in factors)


def describe_update(plan: Callable[[int], Any], schedule: LambdaLR, update: int) -> str:
    """Return where to look when update number `update` (from 1) went wrong.

    Args:
        plan: returns the global batches of an epoch, each a list of micro-batches of rows.
    """
    epoch, index = divmod(update - 1, len(plan(0)))
    rows = sorted(int(row) for micro_batch in plan(epoch)[index] for row in micro_batch)
    rate = learning_rate_at(schedule, update - 1)
    return (
        f"Its learning rate was {rate:.3g}, its training rows (from 0) {rows}: look at them, lower "
        "--learning_rate, or train without fp16"
    )
