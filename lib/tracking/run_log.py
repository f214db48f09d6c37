"""What a run says of itself: metrics.jsonl, which is the truth, and the terminal."""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from lib.checkpoints.output import replacing, writing
from lib.tracking.trackers import Trackers

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends a line to metrics.jsonl for each logged update and each evaluation.

    Lines hold `update`, `epoch` and the figures. Only the main process writes, and passes each line
    on to the trackers.

    Args:
        source: the checkpoint that a run goes on from, which holds the lines so far; None starts
            anew.

    Attributes:
        earlier: the lines that an earlier start had written.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, trackers: Trackers, *, source: Path | None
    ) -> None:
        self.path = folder / METRICS_FILE
        self.accelerator = accelerator
        self.trackers = trackers
        self.earlier: list[dict[str, Any]] = []
        if accelerator.is_main_process:
            self.earlier = self.lines()
            with replacing(self.path) as new:
                new.write_bytes(b"" if source is None else (source / METRICS_FILE).read_bytes())

    def lines(self) -> list[dict[str, Any]]:
        """The lines so far, without one that a killed run left half."""
        found = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def write(self, update: int, values: Mapping[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            line = {"update": update, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(line)


class Speed:
    """Rows and real tokens (no padding) per second of training; evaluations do not count.

    Attributes:
        seconds_to_first_update: from the first start of the run.
    """

    def __init__(self) -> None:
        self.created = time.perf_counter()
        self.since: float | None = None
        self.seconds_to_first_update: float | None = None
        self.rows = self.tokens = 0
        self.seconds = 0.0
        # At the last reading.
        self.read_rows = self.read_tokens = 0
        self.read_seconds = 0.0

    def resume(self) -> None:
        """Training goes on from here."""
        self.since = time.perf_counter()

    def pause(self) -> None:
        """Training stops here, for an evaluation or a checkpoint."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def add(self, num_rows: int, num_tokens: int) -> None:
        if self.seconds_to_first_update is None:
            self.seconds_to_first_update = time.perf_counter() - self.created
        self.rows += num_rows
        self.tokens += num_tokens

    def read(self) -> dict[str, float]:
        """`examples_per_second` and `tokens_per_second` since the last reading."""
        self.pause()
        rates = self._rates(
            self.rows - self.read_rows,
            self.tokens - self.read_tokens,
            self.seconds - self.read_seconds,
        )
        self._mark()
        self.resume()
        return rates

    def overall(self) -> dict[str, float]:
        """The same over the whole run, whose updates are counted once, and its `seconds`."""
        return {**self._rates(self.rows, self.tokens, self.seconds), "seconds": self.seconds}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, up to the last pause."""
        names = ("rows", "tokens", "seconds", "seconds_to_first_update")
        return {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        for name, value in state.items():
            setattr(self, name, value)
        self._mark()

    def _mark(self) -> None:
        self.read_rows, self.read_tokens = self.rows, self.tokens
        self.read_seconds = self.seconds

    @staticmethod
    def _rates(rows: int, tokens: int, seconds: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        return {"examples_per_second": rows / seconds, "tokens_per_second": tokens / seconds}


class Progress:
    """A progress bar on a terminal; one line for each logged update elsewhere."""

    def __init__(self, num_updates: int, update: int, *, shown: bool) -> None:
        self.num_updates = num_updates
        self.shown = shown
        self.started = time.perf_counter()
        self.first = update
        interactive = shown and sys.stderr.isatty()
        self.bar = tqdm(
            total=num_updates, initial=update, unit="update", disable=not interactive, smoothing=0.1
        )

    def advance(self) -> None:
        self.bar.update()

    def show(self, update: int, values: Mapping[str, Any]) -> None:
        """The figures of a logged update."""
        figures = (
            f"loss {values['loss']:.4f}, {values['examples_per_second']:.1f} examples/s, "
            f"{values['tokens_per_second']:.0f} tokens/s"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(figures)
        elif self.shown:
            elapsed = time.perf_counter() - self.started
            left = elapsed / max(1, update - self.first) * (self.num_updates - update)
            print(
                f"update {update}/{self.num_updates}, epoch {values['epoch']:.2f}: {figures}, "
                f"{left:.0f} s left",
                flush=True,
            )

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self.shown:
            self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    def close(self) -> None:
        self.bar.close()


def quiet_libraries() -> None:
    """Leave the terminal to the run: no load reports and bars of transformers and datasets."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # wandb and accelerate warn once per process of what this script has dealt with.
    warnings.filterwarnings("ignore", category=UserWarning, module="accelerate.accelerator")
