"""The log of a run: metrics.jsonl, which is the truth, the trackers, and the terminal."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lib.checkpoints.atomic import replacing, writing
from lib.checkpoints.run_folder import METRICS_FILE
from lib.tracking.progress import Progress
from lib.tracking.trackers import Trackers


class RunLog:
    """Appends a line to metrics.jsonl for each logged update and each evaluation, and shows it.

    A line holds `update` and figures. Only the main process writes, and passes each line on to the
    trackers.

    Args:
        folder: the output folder.
        source: the checkpoint that the run resumes from, which holds the lines so far, or None.

    Attributes:
        earlier: the lines that an earlier start of the run had written.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, source: Path | None) -> None:
        self.path = folder / METRICS_FILE
        self.accelerator = accelerator
        self.trackers = Trackers(accelerator)
        self.progress = Progress(0, 0, shown=False)
        self.earlier: list[dict[str, Any]] = []
        if accelerator.is_main_process:
            self.earlier = self.lines()
            with replacing(self.path) as new:
                new.write_bytes(b"" if source is None else (source / METRICS_FILE).read_bytes())

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines so far, without one that a killed run left unfinished."""
        found = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def start_progress(self, num_updates: int, update: int) -> None:
        """Start the progress bar of a run that has done `update` of `num_updates`."""
        shown = self.accelerator.is_main_process
        self.progress = Progress(num_updates, update, shown=shown)

    def training(self, update: int, values: Mapping[str, float | None]) -> None:
        """Log the figures of an update."""
        self._write(update, values)
        self.progress.training(update, values)

    def evaluation(
        self, update: int, epoch: int, scores: Mapping[str, float], *, is_best: bool, remark: str
    ) -> None:
        """Log an evaluation; arguments as for `Progress.evaluation`."""
        self._write(update, {f"eval_{name}": score for name, score in scores.items()})
        self.progress.evaluation(update, epoch, scores, is_best=is_best, remark=remark)

    def _write(self, update: int, values: Mapping[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            line = {"update": update, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(line)
