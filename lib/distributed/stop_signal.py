"""A decision of all processes to stop, once one received a signal or failed in the background."""

import signal

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lib.distributed import collectives
from lib.distributed.signals import Signals
from lib.errors import Preempted

# On TPUs the processes talk only through their devices, which have to be waited for: on several,
# one check in so many asks.
CHECKS_ON_TPU = 16

# Above the numbers of signals.
FAILED = 1000


class StopSignal:
    """Asks all processes, at the same points of the run, whether one of them was told to stop.

    A check costs one reduction of one number between CPUs (gloo). On CPUs it is waited for. On
    accelerators it overlaps with the computation and the next check reads the answer, so that
    neither the device waits, nor one process for another.
    """

    def __init__(self, signals: Signals, accelerator: Accelerator) -> None:
        self.signals = signals
        self.accelerator = accelerator
        self.alone = accelerator.num_processes == 1
        self.on_tpu = accelerator.distributed_type == DistributedType.XLA
        self.num_checks = 0
        self.error: BaseException | None = None
        self.waits = accelerator.device.type == "cpu"
        if not self.alone and not self.on_tpu:
            # Own group: a reduction of gradients may be in flight on the default one.
            self.group = torch.distributed.new_group(backend="gloo")
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.work: torch.distributed.Work | None = None

    def fail(self, error: BaseException) -> None:
        """Raise an error of another thread at the next check; an `InputError` on all processes."""
        self.error = error

    def check(self) -> None:
        """Return, or raise on all processes.

        Raises:
            Preempted: one of the processes was told to stop.
            InputError: work beside the training failed.
        """
        number = self._reduced()
        if number >= FAILED:
            collectives.on_all_processes(self.accelerator, self._raise_error)
        if number:
            raise Preempted(signal.Signals(number).name)

    def _reduced(self) -> int:
        """The number of a signal that any of the processes received; 0 for none, or `FAILED`."""
        own = FAILED if self.error else int(self.signals.received or 0)
        if self.alone:
            return own
        if self.on_tpu:
            self.num_checks += 1
            asks = self.num_checks % CHECKS_ON_TPU == 0
            return max(collectives.gather(self.accelerator, own)) if asks else 0
        answer = 0 if self.waits else self._answer()
        self.flag.fill_(own)
        self.work = torch.distributed.all_reduce(
            self.flag, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True
        )
        return self._answer() if self.waits else answer

    def _raise_error(self) -> None:
        if self.error:
            raise self.error

    def _answer(self) -> int:
        if self.work is None:
            return 0
        self.work.wait()
        return int(self.flag)
