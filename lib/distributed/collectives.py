"""Run work on some or all processes; an error on one is raised on all."""

import os
from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object

from lib.backends import xla
from lib.errors import InputError

Result = TypeVar("Result")


def check_world(num_processes: int) -> None:
    """Refuse to train alone where several processes were asked for.

    Without a GPU, Accelerate turns the processes of a multi-GPU launch into as many independent
    trainings, silently and into one folder.

    Raises:
        InputError: the launcher or Slurm started more processes than this run has.
    """
    for variable, starter in (("WORLD_SIZE", "the launcher"), ("SLURM_STEP_NUM_TASKS", "srun")):
        asked = int(os.environ.get(variable, "1"))
        if asked > num_processes:
            raise InputError(
                f"{starter} started {asked} processes ({variable}), but they do not see each other "
                f"(this run has {num_processes}): on CPUs set ACCELERATE_USE_CPU=true; under srun "
                "start them as slurm/multi_node.sbatch does"
            )


def gather(accelerator: Accelerator | PartialState, value: Result) -> list[Result]:
    """Return the values of all processes, by rank."""
    if accelerator.distributed_type == DistributedType.XLA:
        return xla.gather_object(value, accelerator.num_processes)
    values: list[Result] = gather_object([value])
    return values


def on_all_processes(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on every process.

    Raises:
        InputError: on all processes, if `work` raised it on any.
    """
    error = None
    try:
        result = work()
    except InputError as problem:
        error = str(problem)
    errors = [message for message in gather(accelerator, error) if message is not None]
    if errors:
        raise InputError(errors[0])
    return result


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Run `work` on the main process, which gets the result; the others wait and get None.

    Raises:
        InputError: as `on_all_processes`.
    """
    return on_all_processes(accelerator, lambda: work() if accelerator.is_main_process else None)


def from_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process; all get its result.

    Raises:
        InputError: as `on_all_processes`.
    """
    result = gather(accelerator, on_main_process(accelerator, work))[0]
    return cast(Result, result)


def main_processes_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process, then on that of each other machine, then on the rest.

    The first fills the caches. Where machines do not share them, each fills its own.

    Raises:
        InputError: as `on_all_processes`.
    """
    own_turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    result = None
    for turn in range(3):
        done = on_all_processes(accelerator, work if turn == own_turn else lambda: None)
        result = result if done is None else done
    assert result is not None
    return result
