"""A decision of all processes to halve their micro-batches, once one of them ran out of memory."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm import tqdm

from lib.distributed.collectives import from_main_process, on_main_process
from lib.errors import InputError


class Sampler(Protocol):
    """A sampler that cuts each update into `num_micro_batches`, over all processes."""

    num_micro_batches: int

    def plan(self, epoch: int, /) -> Any: ...


class Folder(Protocol):
    """An output folder that keeps the size found, as `RunFolder` does."""

    def found_micro_batch_size(self, source: Path | None, /) -> int | None: ...

    def keep_micro_batch_size(self, size: int, /) -> None: ...


def check_repeatable(given: int | str | None, state: AcceleratorState) -> None:
    """Refuse `auto` where an update cannot be repeated in smaller micro-batches.

    FSDP2 and DeepSpeed communicate in the forward and backward passes, so that a process which runs
    out of memory in one leaves the others waiting. XLA allocates later than its errors could be
    caught, and compiled models and XLA are made for one size.

    Raises:
        InputError: this is such a backend.
    """
    backend, compiler = state.distributed_type.value, state.dynamo_plugin.backend.value
    if given != "auto" or (backend not in ("FSDP", "DEEPSPEED", "XLA") and compiler == "NO"):
        return
    where = f"the compiler {compiler.lower()}" if compiler != "NO" else backend
    raise InputError(
        f"--per_device_train_batch_size auto does not work with {where}, where an update that ran "
        "out of memory cannot be done again: give a number of rows"
    )


class MicroBatchSize:
    """The most rows of a micro-batch, halved whenever those of an update do not fit into memory.

    A backward pass that sums gradients over the processes leaves them waiting for one that has run
    out of memory. So each process first computes its own gradients, all agree on whether everyone
    has them, through CPUs (gloo), and only then are they summed. Under FSDP2 and DeepSpeed the
    forward and backward passes themselves communicate.

    Args:
        given: by the user. Unless it is "auto", an error of memory is raised as it is.
        folder: keeps the size found, for later starts.
        source: the checkpoint that the run resumes from, or None.

    Raises:
        InputError: on all processes, if what an earlier start found cannot be read.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampler: Sampler,
        given: int | str | None,
        folder: Folder,
        source: Path | None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.sampler = sampler
        self.automatic = given == "auto"
        self.folder = folder
        self.failed = torch.zeros(1, dtype=torch.int64)
        self.alone = accelerator.num_processes == 1
        accumulation = accelerator.gradient_accumulation_steps
        processes = accelerator.num_processes
        assert accumulation * processes == sampler.num_micro_batches, "a backend has its own"
        if not self.automatic:
            return
        self.to_keep: int | None = None
        if not self.alone:
            # Own group, as the stop signal has: its reduction may be in flight.
            self.group = torch.distributed.new_group(backend="gloo")
        find = partial(folder.found_micro_batch_size, source)
        found = from_main_process(accelerator, find)
        if found is not None and found < self._most_rows():
            rows = f"{found} row{'s' * (found > 1)}"
            self._say(f"an earlier start ran out of memory: at most {rows} in a micro-batch")
            self._set(found)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Note that a forward or backward pass runs out of memory, instead of raising the error."""
        if not self.automatic:
            yield
            return
        try:
            with self.accelerator.no_sync(self.model):
                yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            self.failed.fill_(1)

    def fits(self) -> bool:
        """Return whether all processes have the gradients of this update, then summed over them.

        If one has not, all drop theirs, and the micro-batches are smaller from here on.

        Raises:
            InputError: on all processes, if not even one row fits.
        """
        if not self.automatic:
            return True
        if not self.alone:
            torch.distributed.all_reduce(
                self.failed, torch.distributed.ReduceOp.MAX, group=self.group
            )
        if self.failed:
            self._halve()
            return False
        if not self.alone:
            self._average_gradients()
        if self.to_keep is not None:
            on_main_process(
                self.accelerator, partial(self.folder.keep_micro_batch_size, self.to_keep)
            )
            self.to_keep = None
        return True

    def _most_rows(self) -> int:
        return int(self.sampler.plan(0).most_rows)

    def _halve(self) -> None:
        self.failed.zero_()
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        # Not the size that was set: on this many processes updates may be cut finer than it asks.
        size = self._most_rows()
        if size == 1:
            raise InputError(
                "out of memory with one row in each micro-batch, the fewest: lower --max_length, "
                "give --gradient_checkpointing or --mixed_precision bf16, or take a smaller model"
            )
        half = -(-size // 2)
        self._say(
            f"out of memory with {size} rows in a micro-batch: the same update again with {half}, "
            "in more of them"
        )
        self._set(half)
        self.to_keep = half  # once it fits

    def _set(self, size: int) -> None:
        """Cut updates as --per_device_train_batch_size `size` does."""
        num_rows = int(self.sampler.plan(0).sizes.max())
        accumulation = -(-num_rows // (size * self.accelerator.num_processes))
        self.accelerator.gradient_accumulation_steps = accumulation
        # Accelerate counts micro-batches, and synchronizes at each multiple of the accumulation.
        self.accelerator.step = 0
        self.sampler.num_micro_batches = accumulation * self.accelerator.num_processes

    def _average_gradients(self) -> None:
        """Do what DDP does after the backward pass, in place: there may be no memory to spare."""
        reductions = []
        for weight in self.model.parameters():
            if weight.grad is not None:
                weight.grad /= self.accelerator.num_processes
                reductions.append(torch.distributed.all_reduce(weight.grad, async_op=True))
        for reduction in reductions:
            reduction.wait()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line, file=sys.stderr)  # above the progress bar, if there is one
