"""A trace of some updates, by Accelerate's profiler."""

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs
from torch.profiler import record_function

from lib.backends.devices import device_name
from lib.checkpoints.atomic import replacing, write_text, writing
from lib.checkpoints.run_folder import PROFILE_FOLDER
from lib.data.batching import Integers
from lib.errors import InputError
from lib.tracking.profiling.operators import DATA, UPDATE, Times, dominating, table, times_of

# Updates of this start that are not traced: the first ones allocate, and compile.
WARM_UP = 10

# The rows and the micro-batches of an update: `MicroBatches.updates`.
Batch = dict[str, torch.Tensor]
Update = tuple[list[Integers], Iterator[Batch]]


class Profiler:
    """Traces the first updates of this start after `WARM_UP` others.

    Each process writes its trace to `profile/updates_{first}_to_{last}.rank_{i}.json`, the main
    process what took its time to `profile/updates_{first}_to_{last}.md`. Updates that were traced
    before are not traced again. Without a collective: a process that is lost does not hang here.

    Args:
        folder: the output folder.
        done: updates before this start, of `last`.
        num_updates: to trace; the warm-up is shorter where they would not fit.
        say: prints a line on the main process.
        pause: stops the clock of the speed, as the writing is no training.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        done: int,
        last: int,
        num_updates: int,
        say: Callable[[str], None],
        pause: Callable[[], None],
    ) -> None:
        self.accelerator = accelerator
        self.say, self.pause = say, pause
        self.warm_up = max(1, min(WARM_UP, last - done - num_updates))
        self.first = done + self.warm_up + 1
        self.last = min(done + self.warm_up + num_updates, last)
        self.folder = folder / PROFILE_FOLDER
        self.num_ended = 0
        self.profiler: torch.profiler.profile | None = None
        self.update: record_function | None = None
        self.traced: Generator[Any, None, None] | None = None
        self.cut_short = False

    def updates(self, updates: Iterator[Update]) -> Iterator[Update]:
        """Yield the same updates, and trace some of them."""
        self.traced = self._updates(updates)
        return self.traced

    def finish(self) -> None:
        """Write what was traced, as no more updates come."""
        self.cut_short = True
        self.discard()

    def discard(self) -> None:
        """Stop without writing; the run that resumes traces its own updates."""
        if self.traced is not None:
            self.traced.close()

    def _updates(self, updates: Iterator[Update]) -> Generator[Update, None, None]:
        if self.first > self.last:
            self.say("--profile: too few updates are left to trace any")
        elif self._path(self.last, self._suffix).exists():
            self.say(
                f"--profile: {self._path(self.last, '.md')} is there already; remove the files of "
                "these updates to trace them again"
            )
        else:
            schedule = {"active": self.last - self.first + 1, "repeat": 1}
            schedule |= {"wait": self.warm_up - 1, "warmup": 1}
            options = ProfileKwargs(schedule_option=schedule, on_trace_ready=self._write)
            try:
                with self.accelerator.profile(options) as self.profiler:
                    while self.num_ended < self.warm_up + schedule["active"]:
                        if self.num_ended == self.warm_up and self.update is None:
                            self.say(
                                f"tracing updates {self.first} to {self.last}: they are slower "
                                "than others, and count in the speed"
                            )
                        rows, micro_batches = next(updates)
                        if self.update is None:  # else the same one again
                            self.update = record_function(UPDATE)
                            self.update.__enter__()
                        yield rows, _fetched(micro_batches)
            finally:
                self.profiler = None
        yield from updates

    def end_update(self) -> None:
        """Mark the end of an update; what follows until the next one is not a part of it."""
        if self.profiler is not None and self.update is not None:
            self.update.__exit__(None, None, None)
            self.update = None
            self.num_ended += 1
            self.profiler.step()

    def _path(self, last: int, suffix: str) -> Path:
        return self.folder / f"updates_{self.first}_to_{last}{suffix}"

    @property
    def _suffix(self) -> str:
        return f".rank_{self.accelerator.process_index}.json"

    def _write(self, profiler: torch.profiler.profile) -> None:
        """Write a trace that is complete or cut short; not that of a run that an error ended."""
        if not self.cut_short and self.num_ended <= self.last - self.first + self.warm_up:
            return
        self.pause()
        device = self.accelerator.device
        # PyTorch's profiler does not see what an XLA device does.
        on_device = device.type not in ("cpu", "xla")
        times = times_of(profiler.events(), on_device=on_device)
        if not times.num_updates:
            return
        last = self.first + times.num_updates - 1
        try:
            self._write_files(profiler, times, last)
        except InputError as error:
            # On this process alone, which must not leave the others waiting for it.
            rank = self.accelerator.process_index
            print(f"--profile: rank {rank} goes on without its trace: {error}", file=sys.stderr)

    def _write_files(self, profiler: torch.profiler.profile, times: Times, last: int) -> None:
        device = self.accelerator.device
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        with replacing(self._path(last, self._suffix)) as new:
            profiler.export_chrome_trace(str(new))
        if not self.accelerator.is_main_process:
            return
        processes = self.accelerator.num_processes
        where = f"{device_name(device)}, rank 0 of {processes}, torch {torch.__version__}"
        if device.type == "xla":
            where += "; the host alone, as PyTorch's profiler does not see XLA devices"
        title = f"Updates {self.first} to {last}: {where}"
        write_text(self._path(last, ".md"), table(times, title))
        self.say(
            f"profile of updates {self.first} to {last}: {dominating(times)} "
            f"({self._path(last, '.md')})"
        )


def _fetched(micro_batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the micro-batches of an update, and mark the time in which each is fetched."""
    while True:
        with record_function(DATA):
            batch = next(micro_batches, None)
        if batch is None:
            return
        yield batch
