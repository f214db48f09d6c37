"""The loss, gradient norm, cost and padding of updates, read without stalling the device."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lib.backends import deepspeed, devices
from lib.errors import NonFiniteError
from lib.model.flops import RowFlops, training_flops

# What is counted between two readings.
COUNTS = ("total_weight", "num_tokens", "num_padded")


class Meter:
    """Sums the loss over micro-batches, and keeps a non-finite gradient from being applied.

    Reading a number from a GPU makes the CPU wait for it, so numbers stay on the device until a
    line is logged. A gradient that is not finite must be stopped before that: a fused optimizer
    skips an update, on the device, while its `found_inf` is 1 (the mechanism of gradient scalers),
    and it stays 1 from the first bad update on. The steps of other optimizers are undone there;
    those of DeepSpeed are not PyTorch's, and the norm is read at once. Under fp16 the scaler skips
    what overflows, and only the loss is watched here.

    Args:
        describe_update: returns the rows and learning rate of an update, for the error about it.
        started: when the run began, by `time.perf_counter`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        describe_update: Callable[[int], str],
        started: float,
    ) -> None:
        self.accelerator = accelerator
        # Accelerate's wrapper would keep `found_inf` to itself.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.describe_update = describe_update
        self.scaled = accelerator.scaler is not None or deepspeed.scales_loss(accelerator)
        self.fused = getattr(self.optimizer, "defaults", {}).get("fused", False)
        self.by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if not (self.scaled or self.fused or self.by_deepspeed):
            UndoneSteps(self.optimizer, lambda: self.first_bad > 0)
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.update_loss = torch.zeros((), device=accelerator.device)
        self.grad_norm = torch.zeros((), device=accelerator.device)
        # The number of the first update that was not finite, or 0.
        self.first_bad = torch.zeros((), device=accelerator.device)
        self.total_weight = 0.0
        self.num_tokens = self.num_padded = 0
        self.learning_rate = 0.0
        peak = devices.peak_tflops(accelerator)
        self.speed = Speed(
            started,
            training_flops(accelerator.unwrap_model(model, keep_torch_compile=False)),
            None if peak is None else peak * accelerator.num_processes,
        )
        # In GiB, of the process that has used most, by the kind of memory.
        self.peak_memory: dict[str, float] = {}

    def start_update(self) -> None:
        """Start an update, or the same one again; what it added so far does not count."""
        self.speed.start()
        self.update_loss.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, summed over its rows."""
        self.update_loss += loss.detach()

    def guard_update(
        self, update: int, total_weight: float, grad_norm: Tensor | float | None
    ) -> None:
        """Keep update number `update` (from 1) from being applied if it is not finite.

        Args:
            total_weight: of the rows of the update, over all processes: by default their number.
            grad_norm: DeepSpeed gives a plain number, and None before its first update.
        """
        self.total_weight += total_weight
        self.learning_rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        self.loss_sum += self.update_loss
        if isinstance(grad_norm, Tensor) and hasattr(grad_norm, "full_tensor"):
            grad_norm = grad_norm.full_tensor()  # of FSDP, of which each rank has a part
        self.grad_norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm)
        bad = ~torch.isfinite(self.loss_sum)
        if not self.scaled:
            bad |= ~torch.isfinite(self.grad_norm.to(bad.device))
        self.first_bad = torch.where(bad & (self.first_bad == 0), float(update), self.first_bad)
        if self.scaled:
            return
        if self.fused:
            setattr(self.optimizer, "found_inf", (self.first_bad > 0).float())  # noqa: B010
        elif self.by_deepspeed:
            self.check()

    def count_update(self, num_rows: int, num_tokens: int, num_padded: int, squares: int) -> None:
        """Count the rows and, as `batching.Tokens`, the tokens of an update, over all processes."""
        self.num_tokens += num_tokens
        self.num_padded += num_padded
        self.speed.add(num_rows, num_tokens, squares)

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
                f"applied. {self.describe_update(update)}"
            )

    def loss(self) -> float:
        """Return the mean loss over the rows since the last reading.

        Raises:
            NonFiniteError: as `check`.
        """
        self.check()
        return self.accelerator.reduce(self.loss_sum, reduction="sum").item() / self.total_weight

    def read(self) -> dict[str, float | None]:
        """Return the figures of the updates since the last reading, and start the next.

        `loss` is the mean over the rows (with class weights, the weighted mean), `grad_norm` that
        of the last update (None if it is not finite, as under fp16 when the scaler skips an
        update), `padding` its share in the tokens, `learning_rate` the highest of the last update;
        those of `Speed.read`, and the peak of memory so far.

        Raises:
            NonFiniteError: as `check`.
        """
        mean = self.loss()
        norm = float(self.grad_norm)
        padding = 1 - self.num_tokens / self.num_padded
        self.loss_sum.zero_()
        self.total_weight = 0.0
        self.num_tokens = self.num_padded = 0
        return {
            "loss": mean,
            "grad_norm": norm if math.isfinite(norm) else None,
            "padding": padding,
            "learning_rate": self.learning_rate,
            **self._measured_memory(),
            **self.speed.read(),  # last, as it starts the clock
        }

    def _measured_memory(self) -> dict[str, float]:
        peak = devices.peak_memory(self.accelerator.device)
        if peak is not None:
            name, own = peak
            of_all = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
            self.peak_memory[name] = max(self.peak_memory.get(name, 0.0), of_all.max().item())
        return self.peak_memory

    def overall(self) -> dict[str, Any]:
        """Return the cost of the whole run, however often it was resumed.

        The speed, its `seconds`, and the peak of memory at the last reading.
        """
        figures = self.speed.overall() | self.peak_memory
        cost = {f"train_{name}": value for name, value in figures.items()}
        return cost | {"seconds_to_first_update": self.speed.seconds_to_first_update}

    def state_dict(self) -> dict[str, Any]:
        """What was summed since the last reading; all processes call this."""
        sums = self.accelerator.gather(self.loss_sum.reshape(1)).tolist()
        counts = {name: getattr(self, name) for name in COUNTS}
        speed = self.speed.state_dict()
        return {"loss_sums": sums, **counts, "speed": speed, "peak_memory": self.peak_memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may be of another number of processes."""
        sums, process = state["loss_sums"], self.accelerator.process_index
        if len(sums) != self.accelerator.num_processes:
            sums = [math.fsum(sums) if number == 0 else 0.0 for number in range(process + 1)]
        self.loss_sum.fill_(sums[process])
        for name in COUNTS:
            setattr(self, name, state[name])
        self.speed.load_state_dict(state["speed"])
        self.peak_memory = dict(state.get("peak_memory", {}))  # earlier versions had none


class UndoneSteps:
    """Undoes the steps of an optimizer, on its device and without waiting for it.

    Keeps a copy of the weights and moments during each step.

    Args:
        undo: returns a tensor on the device, which is true to undo the step just made.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, undo: Callable[[], Tensor]) -> None:
        self.optimizer = optimizer
        self.undo = undo
        optimizer.register_step_pre_hook(self._copy)
        optimizer.register_step_post_hook(self._choose)

    def _tensors(self) -> Iterator[Tensor]:
        """Weights and moments; not AdamW's step counter, which is on the CPU."""
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                yield weight
                for moment in self.optimizer.state.get(weight, {}).values():
                    if moment.device == weight.device:
                        yield moment

    @torch.no_grad()
    def _copy(self, *_: Any) -> None:
        self.before = {tensor: tensor.clone() for tensor in self._tensors()}

    @torch.no_grad()
    def _choose(self, *_: Any) -> None:
        undo = self.undo()
        for tensor in self._tensors():
            # Moments that the step has created were 0.
            tensor.copy_(torch.where(undo, self.before.get(tensor, 0.0), tensor))
        del self.before


class Speed:
    """Rows, real tokens (no padding) and FLOPs per second of training, without evaluations.

    Args:
        flops: of a row, or None if they are not known.
        peak_tflops: TFLOP/s of all devices, or None.

    Attributes:
        seconds_to_first_update: from the first start of the run.
    """

    def __init__(self, started: float, flops: RowFlops | None, peak_tflops: float | None) -> None:
        self.started = started
        self.flops = flops
        self.peak_tflops = peak_tflops
        self.since: float | None = None
        self.seconds_to_first_update: float | None = None
        self.rows = self.tokens = self.squares = 0
        self.seconds = 0.0
        self._mark()

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self.since is None:
            self.since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, for an evaluation or a checkpoint."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def add(self, num_rows: int, num_tokens: int, squares: int) -> None:
        """Count the rows and real tokens of an update, and the squared lengths of its rows."""
        if self.seconds_to_first_update is None:
            self.seconds_to_first_update = time.perf_counter() - self.started
        self.rows += num_rows
        self.tokens += num_tokens
        self.squares += squares

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading.

        `examples_per_second`, `tokens_per_second`; `model_tflops_per_second` where the FLOPs are
        known, and `flops_utilization`, its share of the peak rate, where that is.
        """
        self.pause()
        now = (self.rows, self.tokens, self.squares, self.seconds)
        rates = self._rates(*(new - old for new, old in zip(now, self.marked, strict=True)))
        self._mark()
        self.start()
        return rates

    def overall(self) -> dict[str, float]:
        """Return the same over all updates, and the `seconds` they took."""
        rates = self._rates(self.rows, self.tokens, self.squares, self.seconds)
        return {**rates, "seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """The counts and seconds up to the last pause."""
        names = ("rows", "tokens", "squares", "seconds", "seconds_to_first_update")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._mark()

    def _mark(self) -> None:
        """Remember where the next reading starts."""
        self.marked = (self.rows, self.tokens, self.squares, self.seconds)

    def _rates(
        self, rows: float, tokens: float, squares: float, seconds: float
    ) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        rates = {"examples_per_second": rows / seconds, "tokens_per_second": tokens / seconds}
        if self.flops is not None:
            flops = self.flops.linear * tokens + self.flops.square * squares
            rates["model_tflops_per_second"] = flops / seconds / 1e12
            if self.peak_tflops is not None:
                utilization = rates["model_tflops_per_second"] / self.peak_tflops
                rates["flops_utilization"] = utilization
        return rates
