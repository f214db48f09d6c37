"""AdamW's parameter groups, the learning rate as a function of the update, and the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from lib.data.tasks import IGNORED
from lib.model.layers import encoder_layers


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layerwise_lr_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups: no weight decay on biases and normalization weights (any vector).

    With `layerwise_lr_decay` below 1, the classifier and pooler learn at `learning_rate`, the top
    layer at that times the decay, and so on down to the embeddings. Source: Howard and Ruder
    (2018), section 3.2; Zhang et al. (2021), section 3.
    """
    depth_of: dict[int, int] = {}
    if layerwise_lr_decay != 1:
        layers = encoder_layers(model)
        for parameter in model.base_model.parameters():
            depth_of[id(parameter)] = len(layers) + 1
        for number, layer in enumerate(layers):
            for parameter in layer.parameters():
                depth_of[id(parameter)] = len(layers) - number
        pooler = getattr(model.base_model, "pooler", None)
        for parameter in pooler.parameters() if pooler is not None else ():
            depth_of[id(parameter)] = 0
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((depth_of.get(id(parameter), 0), decay), []).append(parameter)
    return [
        {"params": group, "lr": learning_rate * layerwise_lr_decay**depth, "weight_decay": decay}
        for (depth, decay), group in groups.items()
    ]


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


def loss_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy, or the squared error of a single logit, summed over the rows.

    A sum, so that the loss of an update is the same however its rows are cut into micro-batches.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression; any floating dtype.
        labels: (rows,); rows labeled `IGNORED` do not count.
    """
    logits = logits.float()
    if logits.shape[-1] == 1:
        errors = (logits.squeeze(-1) - labels.float()).square()
        return torch.where(labels == IGNORED, 0.0, errors).sum()
    return nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
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
