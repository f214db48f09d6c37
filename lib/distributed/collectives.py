"""What the processes of one run must agree on: how many they are, and whether they may go on."""

import os
import signal
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from lib.distributed.signals import Signals
from lib.errors import InputError, Preempted

Result = TypeVar("Result")


def check_world(num_processes: int) -> None:
    """Refuse to train alone where several processes were asked for.

    Without a GPU, Accelerate turns the processes of a multi-GPU launch into as many whole
    trainings of their own, in silence and into one folder.

    Raises:
        InputError: the launcher or Slurm started more processes than this run has.
    """
    for variable, starter in (("WORLD_SIZE", "the launcher"), ("SLURM_STEP_NUM_TASKS", "srun")):
        asked = int(os.environ.get(variable, "1"))
        if asked > num_processes:
            raise InputError(
                f"{starter} started {asked} processes ({variable}), but they do not see each other "
                f"(this run has {num_processes}): on CPUs set ACCELERATE_USE_CPU=true; under srun "
                "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )


def precision(accelerator: Accelerator) -> str:
    """The precision that the model really runs in; Accelerate runs fp16 on CPUs as fp32."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        return "no"
    return str(accelerator.mixed_precision)


def degradations(accelerator: Accelerator) -> list[str]:
    """What this run does less well than it was asked to, or could; a line for each.

    On a machine without a GPU, `accelerate launch` sets OMP_NUM_THREADS=1 if it is given neither
    a configuration file with `use_cpu` nor a number of threads.
    """
    lines = []
    if precision(accelerator) != accelerator.mixed_precision:
        lines.append("fp16 is not to be had on CPUs: training in fp32; bf16 would work")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and torch.get_num_threads() == 1 and (cores or 1) > 1:
        lines.append(
            f"training with 1 thread on {cores} cores: give accelerate launch --config_file "
            "accelerate_configs/cpu.yaml or --num_cpu_threads_per_process"
        )
    return lines


class Agreement:
    """Asks, at the same points of all processes, whether one of them was told to stop.

    A point costs one reduction of one number between processors (gloo). On CPUs it is waited for.
    On accelerators it runs beside the computation and the answer is taken at the next point, so
    that neither the device waits, nor one process for another.

    Attributes:
        leave: called on all processes before they stop; returns the words for what it saved.
    """

    def __init__(self, signals: Signals, accelerator: Accelerator) -> None:
        self.signals = signals
        self.accelerator = accelerator
        self.leave: Callable[[], str] = lambda: "before the first update"
        self.alone = accelerator.num_processes == 1
        self.on_tpu = accelerator.distributed_type == DistributedType.XLA
        self.waits = accelerator.device.type == "cpu"
        if not self.alone and not self.on_tpu:
            # A group of its own, so as not to get between the reductions of gradients.
            self.group = torch.distributed.new_group(backend="gloo")
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.work: torch.distributed.Work | None = None
        self.stopping = False

    def check(self) -> None:
        """Go on, or leave together.

        Raises:
            Preempted: on all processes, when one of them was told to stop.
        """
        if self.stopping:
            return  # `leave` comes by here
        number = self._agreed()
        if number:
            self.stopping = True
            raise Preempted(f"stopped by {signal.Signals(number).name} {self.leave()}")

    def _agreed(self) -> int:
        """The number of a signal that one of the processes received; 0 for none."""
        own = int(self.signals.received or 0)
        if self.alone:
            return own
        if self.on_tpu:
            number = torch.tensor([own], device=self.accelerator.device)
            return int(self.accelerator.gather(number).max())
        answer = 0 if self.waits else self._answer()
        self.flag.fill_(own)
        self.work = torch.distributed.all_reduce(
            self.flag, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True
        )
        return self._answer() if self.waits else answer

    def _answer(self) -> int:
        if self.work is None:
            return 0
        self.work.wait()
        return int(self.flag)


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do `work` on every process; what goes wrong on one of them goes wrong on all.

    Raises:
        InputError: on all processes, if `work` raised it on any.
    """
    error = None
    try:
        result = work()
    except InputError as problem:
        error = str(problem)
    # Accelerate does not gather objects on TPUs; there the launcher ends the others.
    on_tpu = accelerator.distributed_type == DistributedType.XLA
    gathered = [error] if on_tpu else gather_object([error])
    errors = [message for message in gathered if message is not None]
    if errors:
        raise InputError(errors[0])
    return result


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Do `work` on the main process, whose result it gets; the others wait and get None.

    Raises:
        InputError: as `together`.
    """
    return together(accelerator, lambda: work() if accelerator.is_main_process else None)


def once_per_machine(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Let one process of each machine do `work` and fill the caches, then the others.

    Raises:
        InputError: as `together`.
    """
    result = together(accelerator, lambda: work() if accelerator.is_local_main_process else None)
    others = together(accelerator, lambda: None if accelerator.is_local_main_process else work())
    done = others if result is None else result
    assert done is not None
    return done


def restarted() -> bool:
    """Whether torchrun or Slurm started this run again, with the command line of the first time."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in names)
