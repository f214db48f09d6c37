"""The log of a run: metrics.jsonl, the trackers, and the terminal."""

import atexit
import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lib.checkpoints.atomic import replacing, writing
from lib.checkpoints.run_folder import METRICS_FILE, read_status
from lib.data.tasks import Task
from lib.distributed import collectives
from lib.errors import TRY_AGAIN, NonFiniteError
from lib.tracking import wandb_charts, wandb_run
from lib.tracking.profiling.profiler import Profiler, Update
from lib.tracking.progress import Progress
from lib.tracking.trackers import Trackers
from lib.training.evaluation import Evaluation, Predictions
from lib.training.metrics import metric_names


class RunLog:
    """Appends a line to metrics.jsonl for each logged update and each evaluation, and shows it.

    A line holds `update` and figures. Only the main process writes, and passes each line on to the
    trackers.

    Args:
        folder: the output folder.
        source: the checkpoint that the run resumes from, which holds the lines so far, or None.
        update: updates done, of `num_updates`.

    Attributes:
        earlier: the lines that an earlier start of the run had written.
        progress: the terminal.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        source: Path | None,
        update: int,
        num_updates: int,
    ) -> None:
        self.folder = folder
        self.path = folder / METRICS_FILE
        self.accelerator = accelerator
        self.trackers = Trackers(accelerator)
        self.progress = Progress(num_updates, update, shown=accelerator.is_main_process)
        self.profiler: Profiler | None = None
        self.alerts = False
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

    def start_trackers(self, config: Mapping[str, Any], task: Task) -> None:
        """Start the trackers that the Accelerator names, on the main process.

        Args:
            config: the resolved configuration, and what else a dashboard shows of the run.
            task: whose metrics are logged.
        """
        machines: list[str] = []
        if config["wandb_shared"] and "wandb" in map(str, self.accelerator.log_with):
            machines = machine_names(self.accelerator)
        shared = len(set(machines)) > 1
        if self.accelerator.is_main_process:
            self._start_trackers(config, task, shared)
        if shared:
            run = collectives.gather(self.accelerator, self.trackers.shared_run)[0]
            if run is not None:
                wandb_run.join(self.accelerator, machines, run)

    def _start_trackers(self, config: Mapping[str, Any], task: Task, shared: bool) -> None:
        self.trackers.start(
            [str(name) for name in self.accelerator.log_with],
            config["wandb_project"],
            config,
            folder=self.folder,
            metrics=metric_names(task.metrics, task.others),
            lines=self.lines(),
            earlier=self.earlier,
            wandb_options={
                "entity": config["wandb_entity"],
                "name": config["run_name"],
                "group": config["run_group"],
                "tags": config["tags"] or None,
                "mode": config["wandb_mode"],
            },
            shared=shared,
        )
        self.alerts = config["wandb_alerts"]
        # A run that ends before its trackers do has failed. After wandb's own hook was registered,
        # so that it runs before.
        atexit.register(self._failed)

    def profiled(
        self,
        updates: Iterator[Update],
        num_traced: int | None,
        pause: Callable[[], None],
    ) -> Iterator[Update]:
        """Return the updates of the loop, some of which are traced unless `num_traced` is None.

        Args:
            pause: as for `Profiler`.
        """
        if num_traced is None:
            return updates
        self.profiler = Profiler(
            self.folder,
            self.accelerator,
            done=self.progress.first,
            last=self.progress.num_updates,
            num_updates=num_traced,
            say=self.progress.say,
            pause=pause,
        )
        return self.profiler.updates(updates)

    def advance(self) -> None:
        """Count an update."""
        if self.profiler is not None:
            self.profiler.end_update()
        self.progress.advance()

    def trained(self) -> None:
        """Close the progress bar after the last update, and a trace that it cut short."""
        if self.profiler is not None:
            self.profiler.finish()
        self.progress.close()

    def training(self, update: int, epochs: float, figures: Mapping[str, float | None]) -> None:
        """Log the figures of an update, when so many epochs are done."""
        values = {"epoch": epochs, **figures}
        self._write(update, values)
        self.progress.training(update, values)

    def evaluation(self, update: int, epochs: float, evaluation: Evaluation, is_best: bool) -> None:
        """Log an evaluation after `update`, when so many epochs are done."""
        self._write(update, {f"eval_{name}": score for name, score in evaluation.scores.items()})
        if evaluation.remark:
            self._alert("Collapsed classifier", f"After update {update}, {evaluation.remark}.")
        self.progress.evaluation(
            update, epochs, evaluation.scores, is_best=is_best, remark=evaluation.remark
        )

    def results(
        self,
        results: Mapping[str, Any],
        provenance: Mapping[str, Any],
        predictions: Predictions,
        texts: Mapping[str, Sequence[str]],
        labels: Sequence[str],
        log_model: str,
    ) -> None:
        """Show the results on wandb: charts, the rows with the hardest first, and the model.

        Args:
            predictions: of the split that chose the best model; `texts` are its text columns.
            labels: names of the classes; empty for a regression.
            log_model: "file", "reference" or "none".
        """
        for work in (
            partial(
                wandb_charts.log_predictions, predictions=predictions, texts=texts, names=labels
            ),
            partial(wandb_charts.log_results, results=results),
            partial(
                wandb_charts.log_model,
                folder=self.folder,
                results=results,
                provenance=provenance,
                how=log_model,
            ),
        ):
            self.trackers.call("wandb", work)

    def preempted(self) -> None:
        """Close the progress bar, and tell the trackers that the run will be resumed."""
        if self.profiler is not None:
            self.profiler.discard()
        self.progress.close()
        self._alert("Preempted", "A signal stopped the run, and the same command resumes it.")
        self.trackers.call("wandb", lambda run: run.mark_preempting())
        self.trackers.finish(exit_code=TRY_AGAIN)

    def _failed(self) -> None:
        kind, _, reason = str(read_status(self.folder).get("reason")).partition(": ")
        if kind == NonFiniteError.__name__:
            self._alert("Loss not finite", reason)
        self.trackers.finish(exit_code=1)

    def _alert(self, title: str, text: str) -> None:
        if self.alerts:
            send = partial(wandb_run.alert, folder=self.folder, title=title, text=text)
            self.trackers.call("wandb", send)

    def _write(self, update: int, values: Mapping[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            line = {"update": update, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(line)


def machine_names(accelerator: Accelerator) -> list[str]:
    """Return the name of each process's machine, by rank."""
    return collectives.gather(accelerator, socket.gethostname())
