"""The trackers (wandb, TensorBoard, trackio, ...), which show what metrics.jsonl holds.

metrics.jsonl is the truth. A tracker that fails is given up with a warning, and the run goes on.
Only the main process has trackers.
"""

import atexit
import json
import netrc
import os
import secrets
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from lib.checkpoints.output import write_text
from lib.errors import InputError

RUN_ID_FILE = "wandb_run_id"
STEP = "train/global_step"
EVALUATED = "eval/global_step"

# Seconds that the wandb server has to answer before the run is tracked offline.
SERVER_SECONDS = 5.0

# With one of these set, trackio keeps its runs elsewhere than on this machine.
TRACKIO_SERVERS = {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"}

# What tells lines apart: an update may have one of training and one of an evaluation.
Line = tuple[str, int]


def tracker_names(with_tracking: bool, report_to: Sequence[str]) -> list[str]:
    """The trackers to start: those named, or all that are installed; none unless asked.

    Raises:
        InputError: one is named that is not installed; Accelerate would leave it out in silence.
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
            raise InputError(f"--report_to {name}: it is not installed; pip install {name}")
    return list(report_to)


class Trackers:
    """The trackers that were started, each with the lines that it holds from earlier starts."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.known: dict[str, Callable[[Line], bool]] = {}
        self.unsent: set[Line] = set()  # lines in the offline folders of wandb
        # A run that ends without having finished has failed.
        atexit.register(self.finish, exit_code=1)

    def start(
        self,
        names: Iterable[str],
        project: str,
        config: Mapping[str, Any],
        *,
        folder: Path,
        metrics: Sequence[str],
        lines: Sequence[Mapping[str, Any]],
        earlier: Sequence[Mapping[str, Any]],
        wandb_options: Mapping[str, Any],
    ) -> None:
        """Start trackers, and give them what they lack of `lines`.

        Args:
            config: the resolved configuration and facts of the run.
            metrics: of an evaluation, of which wandb shows the best: the highest, or lowest loss.
            lines: those of metrics.jsonl up to where the run goes on.
            earlier: those that were written, and logged, before the run was started again.
            wandb_options: entity, name, group, tags and mode for `wandb.init`.
        """
        logged = {_key(_named(line)) for line in earlier}
        for name in names:
            try:
                self._start(name, project, config, folder, logged, wandb_options)
            except Exception as error:
                self._give_up(name, error)
        self.call("wandb", lambda run: _define_metrics(run, metrics))
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl: `train/...` or `eval/...`, over `train/global_step`."""
        values = _named(line)
        key = _key(values)
        for tracker in list(self.accelerator.trackers):
            if self.known[tracker.name](key):
                continue
            # wandb drops rows whose step goes back, and takes its axis from the values.
            step = None if tracker.name == "wandb" else key[1]
            self._try(tracker, lambda: tracker.log(values, step=step))  # noqa: B023

    def call(self, name: str, work: Callable[[Any], None]) -> None:
        """Do `work` with the run of the tracker `name`, if it is there."""
        for tracker in list(self.accelerator.trackers):
            if tracker.name == name:
                self._try(tracker, lambda: work(tracker.tracker))  # noqa: B023

    def finish(self, *, exit_code: int = 0) -> None:
        """End the run in the trackers, as one that leaves with `exit_code`."""
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
            self._give_up(tracker.name, error)

    @staticmethod
    def _give_up(name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        print(
            f"{name}: {type(error).__name__}: {reason}; the run goes on without it, and "
            "metrics.jsonl has it all",
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
        config = {field: without_home(value) for field, value in config.items()}
        if name != "wandb":
            config = {
                field: value if isinstance(value, (int, float, str, bool)) else str(value)
                for field, value in config.items()
            }
        if name == "tensorboard":
            # All that is there goes, and comes again from metrics.jsonl.
            options = {"purge_step": 0}
            self.known[name] = lambda line: False
        elif name == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
            # It knows runs by their names, which folders of the same name would share.
            options = {"name": f"{wandb_options['name']}-{run_id(folder)}", "resume": "allow"}
            if logged and not TRACKIO_SERVERS.intersection(os.environ):
                self.known[name] = _trackio_lines(project, options["name"]).__contains__
        elif name == "wandb":
            options = self._wandb_options(folder, wandb_options)
        self._init(name, project, config, options)

    def _init(
        self, name: str, project: str, config: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        self.accelerator.log_with = [name]
        # Accelerate would start and configure those that run once more.
        before, self.accelerator.trackers = self.accelerator.trackers, []
        try:
            self.accelerator.init_trackers(
                project, config=dict(config), init_kwargs={name: options}
            )
            self.accelerator.trackers = before + self.accelerator.trackers
        except Exception:
            self.accelerator.trackers = before
            if name != "wandb" or options["mode"] != "online":
                raise
            import wandb

            wandb.teardown()  # without it the next start finds its run ID in use
            _say_offline("the server refused the start", Path(options["dir"]))
            self._init(name, project, config, {**options, "mode": "offline"})
            return
        if name == "wandb":
            from wandb.sdk.lib import import_hooks

            # They would raise in whoever imports a module once wandb's own process is gone, which
            # Slurm signals too where it signals all descendants of a task.
            import_hooks.unregister_all_post_import_hooks()
            run = self.accelerator.get_tracker("wandb", unwrap=True)
            if not run.offline:
                # The server tells what it has, and `wandb sync` will bring the offline parts.
                seen = {"train": run.summary.get(STEP), "eval": run.summary.get(EVALUATED)}
                self.known[name] = lambda line: (
                    line in self.unsent or line[1] <= (seen[line[0]] or 0)
                )

    def _wandb_options(self, folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
        import wandb

        os.environ.setdefault("WANDB_DIR", str(folder))
        for kind in ("DATA", "CACHE", "CONFIG"):
            # A home that cannot be written would end the run at its first table.
            os.environ.setdefault(
                f"WANDB_{kind}_DIR", str(folder.resolve() / "wandb" / kind.lower())
            )
        folders, known = Path(os.environ["WANDB_DIR"]) / "wandb", _known_id(folder)
        self.unsent = _lines_on_disk(folders.glob(f"offline-run-*-{known}/run-{known}.wandb"))
        sent = _lines_on_disk(folders.glob(f"run-*-{known}/run-{known}.wandb"))
        self.known["wandb"] = (self.unsent | sent).__contains__
        mode = wanted.get("mode") or os.environ.get("WANDB_MODE")
        if mode is None:
            reason = _no_server(wandb.setup().settings.base_url, wandb.setup().settings.api_key)
            mode = "offline" if reason else "online"
            if reason:
                _say_offline(reason, Path(os.environ["WANDB_DIR"]))
        return {
            **wanted,
            "mode": mode,
            "dir": os.environ["WANDB_DIR"],
            "id": run_id(folder),
            "resume": "allow",
            "settings": wandb.Settings(
                x_transaction_log_flush_interval=1.0,  # 15 by default: the tail of a killed run
                init_timeout=60.0,
                finish_timeout=120.0,
            ),
        }


def _define_metrics(run: Any, metrics: Sequence[str]) -> None:
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    for name in metrics:
        best = "min" if name == "loss" else "max"
        run.define_metric(f"eval/{name}", step_metric=STEP, summary=best)


def run_id(folder: Path) -> str:
    """The wandb run of an output folder, however often it is started; `WANDB_RUN_ID` wins."""
    given = os.environ.get("WANDB_RUN_ID")
    path = folder / RUN_ID_FILE
    if given is None and path.exists():
        return path.read_text(encoding="utf-8").strip()
    made = given or secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


def forget_run(folder: Path) -> None:
    """Start a new wandb run in a folder whose run is replaced."""
    (folder / RUN_ID_FILE).unlink(missing_ok=True)


def _say_offline(reason: str, folder: Path) -> None:
    print(
        f"wandb is offline: {reason}; to upload: wandb sync {folder}/wandb/offline-run-*",
        file=sys.stderr,
        flush=True,
    )


def _no_server(base_url: str, api_key: str | None) -> str | None:
    """Why the server cannot be used; None if it answers within `SERVER_SECONDS`."""
    host = urllib.parse.urlparse(base_url).hostname or ""
    try:
        saved = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (FileNotFoundError, netrc.NetrcParseError):
        saved = None
    if not (api_key or saved):
        return "no API key (wandb login)"
    silence = f"{host} does not answer"
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(base_url, method="HEAD")
            urllib.request.urlopen(request, timeout=SERVER_SECONDS).close()
        except urllib.error.HTTPError:
            reasons.append(None)  # it answers
        except (OSError, ValueError) as error:
            reasons.append(f"{silence} ({error})")
        else:
            reasons.append(None)

    # Its time-out does not cover the search for the address, which may take a minute.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SERVER_SECONDS)
    return reasons[0] if reasons else f"{silence} within {SERVER_SECONDS:g} s"


def _lines_on_disk(files: Iterable[Path]) -> set[Line]:
    """What earlier starts of this run wrote to the files of wandb.

    A killed process loses the end of what it logged, so metrics.jsonl does not tell.
    """
    held: set[Line] = set()
    for path in files:
        if path.stat().st_size == 0:
            continue  # killed as it began
        # It prints what it can read, and may fail at the end that a killed process left half.
        printed = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        for line in printed.splitlines():
            record = json.loads(line)
            if record["type"] == "history" and _is_line(record["history"]["item"]):
                held.add(_key(record["history"]["item"]))
    return held


def _trackio_lines(project: str, name: str) -> set[Line]:
    """What earlier starts of this run wrote to trackio's folder.

    Raises:
        OSError: trackio could not read it.
    """
    held: set[Line] = set()
    for kind in ("train", "eval"):
        done = subprocess.run(
            [sys.executable, "-m", "trackio.cli", "get", "metric", "--json",
             "--project", project, "--run", name, "--metric", f"{kind}/loss"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )  # fmt: skip
        if done.returncode == 0:
            held |= {(kind, value["step"]) for value in json.loads(done.stdout)["values"]}
        elif "not found" not in done.stderr:  # as it is if it was killed before the first
            raise OSError(done.stderr)
    return held


def _known_id(folder: Path) -> str:
    path = folder / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else "none"


def without_home(value: Any) -> Any:
    """A value whose paths do not tell who ran it."""
    home = str(Path.home())
    return value.replace(home, "~") if isinstance(value, str) and home != "/" else value


def _named(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl under the names that the trackers group by."""
    values: dict[str, Any] = {STEP: line["update"]}
    if "eval_loss" in line:
        values[EVALUATED] = line["update"]
    for name, value in line.items():
        if name != "update" and value is not None:
            kind, _, rest = name.partition("_")
            values[f"eval/{rest}" if kind == "eval" else f"train/{name}"] = value
    return values


def _is_line(values: Mapping[str, Any]) -> bool:
    """Not a chart, nor one of wandb's own."""
    return STEP in values and ("train/loss" in values or EVALUATED in values)


def _key(values: Mapping[str, Any]) -> Line:
    return "eval" if EVALUATED in values else "train", int(values[STEP])
