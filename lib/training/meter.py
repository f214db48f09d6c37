"""The loss and the gradient norm of the updates, watched without waiting for the device."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from lib.errors import NonFiniteError

# What is counted between two readings.
COUNTS = ("num_rows", "num_tokens", "num_padded")


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
        self.fused = getattr(self.optimizer, "defaults", {}).get("fused", False)
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.update_loss = torch.zeros((), device=accelerator.device)
        self.grad_norm = torch.zeros((), device=accelerator.device)
        # The number of the first update that was not finite, or 0.
        self.first_bad = torch.zeros((), device=accelerator.device)
        self.num_rows = 0
        self.num_tokens = 0
        self.num_padded = 0

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, summed over its rows."""
        self.update_loss += loss.detach()

    def add_tokens(self, num_tokens: int, num_padded: int) -> None:
        """Add the tokens of an update, real ones and those that were padded to."""
        self.num_tokens += num_tokens
        self.num_padded += num_padded

    def before_update(self, update: int, num_rows: int, grad_norm: Tensor | float | None) -> None:
        """Look at update number `update` (from 1), of `num_rows` rows over all processes."""
        self.num_rows += num_rows
        self.loss_sum += self.update_loss
        self.update_loss.zero_()
        if isinstance(grad_norm, DTensor):  # FSDP's, of which each process has a part
            grad_norm = grad_norm.full_tensor()
        # DeepSpeed gives a plain number, and none before its first update.
        self.grad_norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm)
        bad = ~torch.isfinite(self.loss_sum)
        if not self.scaled:
            bad |= ~torch.isfinite(self.grad_norm.to(bad.device))
        self.first_bad = torch.where(bad & (self.first_bad == 0), float(update), self.first_bad)
        if self.scaled:
            return
        if self.fused:
            setattr(self.optimizer, "found_inf", (self.first_bad > 0).float())  # noqa: B010
        else:
            self.check()

    def check(self) -> None:
        """Wait for the device and the other processes.

        Raises:
            NonFiniteError: an update was not finite.
        """
        found = self.accelerator.gather(self.first_bad.reshape(1))
        if found.any():
            update = int(found[found > 0].min())
            raise NonFiniteError(
                f"the loss or the gradient of update {update} is not finite; the update was not "
                f"applied. {self.explain(update)}"
            )

    def state(self) -> dict[str, Any]:
        """What was summed since the last reading, for a checkpoint; all processes call this."""
        sums = self.accelerator.gather(self.loss_sum.reshape(1)).tolist()
        return {"loss_sums": sums} | {name: getattr(self, name) for name in COUNTS}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which may be of another number of processes."""
        sums, process = state["loss_sums"], self.accelerator.process_index
        if len(sums) != self.accelerator.num_processes:
            sums = [math.fsum(sums) if number == 0 else 0.0 for number in range(process + 1)]
        self.loss_sum.fill_(sums[process])
        for name in COUNTS:
            setattr(self, name, state[name])

    def read(self) -> dict[str, float | None]:
        """The mean `loss` over the rows since the last reading, and the last `grad_norm`.

        Also the share of `padding` in the tokens. The norm is None if it is not finite, as under
        fp16 when the scaler skips an update.

        Raises:
            NonFiniteError: as `check`.
        """
        self.check()
        mean = self.accelerator.reduce(self.loss_sum, reduction="sum").item() / self.num_rows
        norm = float(self.grad_norm)
        padding = 1 - self.num_tokens / self.num_padded
        self.loss_sum.zero_()
        for name in COUNTS:
            setattr(self, name, 0)
        return {
            "loss": mean,
            "grad_norm": norm if math.isfinite(norm) else None,
            "padding": padding,
        }
