"""The loss and the gradient norm of the updates, watched without waiting for the device."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from lib.errors import NonFiniteError


class Monitor:
    """Sums the loss over micro-batches, and keeps a non-finite gradient from being applied.

    Reading a number from a GPU makes the processor wait for it, so numbers stay on the device
    until a line is logged. A gradient that is not finite must be stopped before that: a fused
    optimizer skips an update, on the device, while its `found_inf` is 1 (it is what a gradient
    scaler uses), and it stays 1 from the first bad update on. Optimizers without it are read at
    once. Under fp16 the scaler skips what overflows, and only the loss is watched here.

    Args:
        explain: words for an update that went wrong, from its number: its rows and learning rate.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        explain: Callable[[int], str],
    ) -> None:
        self.accelerator = accelerator
        # Accelerate's wrapper would keep `found_inf` to itself.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.explain = explain
        self.scaled = accelerator.scaler is not None
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.grad_norm = torch.zeros((), device=accelerator.device)
        # The number of the first update that was not finite, or 0.
        self.first_bad = torch.zeros((), device=accelerator.device)
        self.num_rows = 0

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, summed over its rows."""
        self.loss_sum += loss.detach()

    def before_update(self, update: int, num_rows: int, grad_norm: Tensor) -> None:
        """Look at update number `update` (from 1), of `num_rows` rows over all processes."""
        self.num_rows += num_rows
        self.grad_norm = grad_norm
        # The gradient is the same on all processes. A loss may be bad on one of them alone, but
        # makes the gradient so too; under fp16 it is found when the sum is read.
        if self.scaled:
            return
        bad = ~torch.isfinite(grad_norm) & (self.first_bad == 0)
        self.first_bad = torch.where(bad, float(update), self.first_bad)
        if self.optimizer.defaults.get("fused"):
            setattr(self.optimizer, "found_inf", (self.first_bad > 0).float())  # noqa: B010
        else:
            self.check(update)

    def check(self, update: int) -> float:
        """The loss summed since the last reading; waits for the device and the other processes.

        Raises:
            NonFiniteError: an update up to number `update` was not finite.
        """
        total = self.accelerator.reduce(self.loss_sum, reduction="sum").item()
        first_bad = int(self.first_bad.item())
        if first_bad or not math.isfinite(total):
            raise NonFiniteError(
                f"the loss or the gradient of update {first_bad or update} is not finite; the "
                f"update was not applied. {self.explain(first_bad or update)}"
            )
        return float(total)

    def read(self, update: int) -> tuple[float, float]:
        """Mean loss over the rows since the last reading, and the last gradient norm.

        Raises:
            NonFiniteError: as `check`.
        """
        mean = self.check(update) / max(1, self.num_rows)
        self.loss_sum.zero_()
        self.num_rows = 0
        return mean, float(self.grad_norm)
