"""The trackers (wandb, TensorBoard, trackio, ...), which show what metrics.jsonl holds.

metrics.jsonl is the source of truth. A tracker that fails is dropped with a warning, and the run
continues. Only the main process has trackers.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from lib.errors import InputError
from lib.tracking import wandb_run
from lib.tracking.logged_lines import EVALUATED, STEP, Line, key_of, named, trackio_lines

# Where the project is not given: the variables that name it, and ours.
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT"}
PROJECT = "train_mrpc"

# With one of these set, trackio keeps its runs elsewhere than on this machine.
TRACKIO_SERVERS = {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"}


def tracker_names(with_tracking: bool, report_to: Sequence[str]) -> list[str]:
    """Return the trackers to start: those named, or all that are installed; none unless asked.

    Raises:
        InputError: one that is named is not installed; Accelerate would skip it silently.
    """
    if "none" in report_to or not (with_tracking or report_to):
        return []
    installed = [str(name) for name in get_available_trackers()]
    if not report_to or "all" in report_to:
        if "wandb" not in installed:
            print("wandb is not installed: nothing is logged to it", file=sys.stderr)
        return installed
    for name in report_to:
        if name not in installed:
            raise InputError(f"--report_to {name}: it is not installed: pip install {name}")
    return list(report_to)


class Trackers:
    """The trackers that were started, each with the lines that it has from earlier starts."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.known: dict[str, Callable[[Line], bool]] = {}
        self.unsent: set[Line] = set()  # lines in the offline folders of wandb
        self.shared = False
        self.shared_run: dict[str, str] | None = None  # which other machines may join

    def start(
        self,
        names: Iterable[str],
        project: str | None,
        config: Mapping[str, Any],
        *,
        folder: Path,
        metrics: Sequence[str],
        lines: Sequence[Mapping[str, Any]],
        earlier: Sequence[Mapping[str, Any]],
        wandb_options: Mapping[str, Any],
        shared: bool = False,
    ) -> None:
        """Start trackers, and log the `lines` that they lack.

        Args:
            project: as given; by default that of the environment, else train_mrpc.
            config: the resolved configuration and facts of the run.
            metrics: names of the figures of an evaluation, of which wandb shows the best.
            lines: those of metrics.jsonl up to where the run resumes.
            earlier: those that were logged before the run was started again.
            wandb_options: entity, name, group, tags and mode as given, for `wandb.init`; where
                one is None, wandb reads the environment.
            shared: whether other machines will add their system metrics to the wandb run.
        """
        self.shared = shared
        logged = {key_of(named(line)) for line in earlier}
        for name in names:
            variable = PROJECT_VARIABLES.get(name, "")
            place = project or os.environ.get(variable) or PROJECT
            try:
                self._start(name, place, config, folder, logged, wandb_options)
            except Exception as error:
                self._drop(name, error)
        self.call("wandb", lambda run: wandb_run.define_metrics(run, metrics))
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl: `train/...` or `eval/...`, over `train/global_step`."""
        values = named(line)
        key = key_of(values)
        for tracker in list(self.accelerator.trackers):
            if self.known[tracker.name](key):
                continue
            # wandb drops rows whose step goes back, and takes its axis from the values.
            step = None if tracker.name == "wandb" else key[1]
            self._try(tracker, lambda: tracker.log(values, step=step))  # noqa: B023

    def call(self, name: str, work: Callable[[Any], None]) -> None:
        """Call `work` with the run of the tracker `name`, if that was started."""
        for tracker in list(self.accelerator.trackers):
            if tracker.name == name:
                self._try(tracker, lambda: work(tracker.tracker))  # noqa: B023

    def finish(self, *, exit_code: int = 0) -> None:
        """End the run in the trackers with its exit code."""
        self.call("wandb", lambda run: run.finish(exit_code=exit_code))
        for tracker in list(self.accelerator.trackers):
            if tracker.name != "wandb":
                self._try(tracker, tracker.finish)
        self.accelerator.trackers = []

    def _try(self, tracker: GeneralTracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.accelerator.trackers.remove(tracker)
            self._drop(tracker.name, error)

    @staticmethod
    def _drop(name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        print(
            f"{name}: {type(error).__name__}: {reason}; the run continues without it, and "
            "metrics.jsonl has every line",
            file=sys.stderr,
            flush=True,
        )

    def _start(
        self,
        name: str,
        project: str,
        config: Mapping[str, Any],
        folder: Path,
        logged: set[Line],
        wandb_options: Mapping[str, Any],
    ) -> None:
        self.known[name] = logged.__contains__
        options: dict[str, Any] = {}
        config = {field: wandb_run.without_home(value) for field, value in config.items()}
        if name != "wandb":
            config = {
                field: value if isinstance(value, (int, float, str, bool)) else str(value)
                for field, value in config.items()
            }
        if name == "tensorboard":
            # Drops what is there, and gets it again from metrics.jsonl.
            options = {"purge_step": 0}
            self.known[name] = lambda line: False
        elif name == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
            # It identifies runs by name, which folders of the same name would share.
            run_name = wandb_options["name"] or folder.resolve().name
            options = {
                "name": f"{run_name}-{wandb_run.run_id(folder)}",
                "resume": "allow",
            }
            if logged and not TRACKIO_SERVERS.intersection(os.environ):
                self.known[name] = trackio_lines(project, options["name"]).__contains__
        elif name == "wandb":
            self.unsent, sent = wandb_run.lines_on_disk(folder)
            self.known[name] = (self.unsent | sent).__contains__
            options = wandb_run.init_options(folder, wandb_options, shared=self.shared)
        self._init(name, project, config, options)

    def _init(
        self, name: str, project: str, config: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        self.accelerator.log_with = [name]
        # Accelerate would start and configure the running ones again.
        before, self.accelerator.trackers = self.accelerator.trackers, []
        try:
            self.accelerator.init_trackers(
                project, config=dict(config), init_kwargs={name: options}
            )
            self.accelerator.trackers = before + self.accelerator.trackers
        except Exception:
            self.accelerator.trackers = before
            if name != "wandb" or options["mode"] not in ("online", "shared"):
                raise
            import wandb

            wandb.teardown()  # or the next start finds its run ID in use
            if options["mode"] == "shared":
                wandb_run.say_alone("the server refused the shared mode")
                self._init(name, project, config, {**options, "mode": "online"})
                return
            wandb_run.say_offline("the server refused the start", Path(options["dir"]))
            self._init(name, project, config, {**options, "mode": "offline"})
            return
        if name == "wandb":
            wandb_run.forget_import_hooks()
            run = self.accelerator.get_tracker("wandb", unwrap=True)
            if options["mode"] == "shared":
                self.shared_run = {"entity": run.entity, "project": run.project, "id": run.id}
            if not run.offline:
                # The server knows what it has, and `wandb sync` will upload the offline parts.
                seen = {"train": run.summary.get(STEP), "eval": run.summary.get(EVALUATED)}
                self.known[name] = lambda line: (
                    line in self.unsent or line[1] <= (seen[line[0]] or 0)
                )
