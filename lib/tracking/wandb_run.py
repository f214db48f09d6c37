"""The wandb run of an output folder: its ID, its files, and whether there is a server."""

import atexit
import netrc
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lib.checkpoints.atomic import write_text
from lib.checkpoints.run_folder import WANDB_ALERTS_FILE, WANDB_RUN_FILE
from lib.tracking.logged_lines import STEP, Line, wandb_lines

# Seconds that the wandb server has to answer before the run is tracked offline.
SERVER_SECONDS = 5.0


def lines_on_disk(folder: Path) -> tuple[set[Line], set[Line]]:
    """Return the lines that earlier starts logged offline, and online, from wandb's files."""
    folders, run = _wandb_folder(folder) / "wandb", _known_id(folder)
    # Folders are named after the second of the start; a second start in it gets the suffix -1.
    offline = wandb_lines(folders.glob(f"offline-run-*/run-{run}.wandb"))
    return offline, wandb_lines(folders.glob(f"run-*/run-{run}.wandb"))


def init_options(folder: Path, wanted: Mapping[str, Any], *, shared: bool) -> dict[str, Any]:
    """Return the arguments of `wandb.init`, offline if no server answers.

    Args:
        folder: the output folder.
        wanted: entity, name, group, tags and mode; None leaves one to wandb's own variable.
        shared: whether other machines will add their system metrics.
    """
    import wandb

    where = _wandb_folder(folder)
    for kind in ("DATA", "CACHE", "CONFIG"):
        # With a read-only home, wandb fails at its first table.
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder.resolve() / "wandb" / kind.lower()))
    mode = wanted.get("mode") or os.environ.get("WANDB_MODE")
    if mode is None:
        settings = wandb.setup().settings
        reason = no_server(settings.base_url, settings.api_key, SERVER_SECONDS)
        mode = "offline" if reason else "online"
        if reason:
            say_offline(reason, where)
    if shared and mode != "online":
        say_alone(f"wandb is {mode}")
    return {
        **wanted,
        "name": wanted["name"] or os.environ.get("WANDB_NAME") or folder.resolve().name,
        "mode": "shared" if shared and mode == "online" else mode,
        "dir": str(where),
        "id": run_id(folder),
        "resume": "allow",
        "settings": wandb.Settings(
            x_transaction_log_flush_interval=1.0,  # 15 by default: the tail of a killed run
            init_timeout=60.0,
            finish_timeout=120.0,
            x_label=socket.gethostname() if shared else None,
        ),
    }


def join(accelerator: Accelerator, machines: Sequence[str], run: Mapping[str, Any]) -> None:
    """Add the system metrics of this machine to the run that the main process started.

    Called on all processes; the first of each other machine does it.

    Args:
        machines: the name of each process's machine, by rank.
        run: entity, project and id.
    """
    rank = accelerator.process_index
    if machines.index(machines[rank]) != rank or machines[rank] == machines[0]:
        return
    import wandb

    # Its files, in a folder that no other machine writes to.
    folder = tempfile.mkdtemp(prefix="wandb-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = wandb.Settings(
        x_primary=False,
        x_label=machines[rank],
        x_update_finish_state=False,
        console="off",
        silent=True,
        init_timeout=60.0,
        finish_timeout=120.0,
    )
    try:
        wandb.init(**run, mode="shared", dir=folder, settings=settings)
    except Exception as error:
        print(
            f"wandb: no system metrics of {machines[rank]}: {' '.join(str(error).split())[:200]}",
            file=sys.stderr,
            flush=True,
        )
    forget_import_hooks()


def forget_import_hooks() -> None:
    """Keep wandb from raising in later imports.

    It would once its own process is gone, which Slurm signals too where it signals all descendants
    of a task.
    """
    from wandb.sdk.lib import import_hooks

    import_hooks.unregister_all_post_import_hooks()


def say_alone(reason: str) -> None:
    """Print why wandb gets the system metrics of this machine only."""
    print(
        f"wandb shows the system metrics of {socket.gethostname()} only: {reason}",
        file=sys.stderr,
        flush=True,
    )


def _wandb_folder(folder: Path) -> Path:
    """The folder of wandb's files: WANDB_DIR, set to the output folder unless the user did."""
    return Path(os.environ.setdefault("WANDB_DIR", str(folder)))


def define_metrics(run: Any, metrics: Sequence[str]) -> None:
    """Set the axis of all charts, and which value of each metric wandb shows as the best."""
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    for name in metrics:
        best = "min" if name == "loss" else "max"
        run.define_metric(f"eval/{name}", step_metric=STEP, summary=best)


def alert(run: Any, folder: Path, title: str, text: str) -> None:
    """Send an alert, unless an earlier start of the run in this output folder has sent it."""
    path = folder / WANDB_ALERTS_FILE
    sent = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if title not in sent:
        run.alert(title=title, text=text, level="WARN")
        write_text(path, "\n".join([*sent, title]) + "\n")


def run_id(folder: Path) -> str:
    """Return the wandb run of an output folder, however often it is started; WANDB_RUN_ID wins."""
    given = os.environ.get("WANDB_RUN_ID")
    path = folder / WANDB_RUN_FILE
    if given is None and path.exists():
        return path.read_text(encoding="utf-8").strip()
    made = given or secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


def say_offline(reason: str, folder: Path) -> None:
    """Print why wandb is offline, and how to upload the run later."""
    where = shlex.quote(f"{folder}/wandb")
    print(
        f"wandb is offline: {reason}; to upload: wandb sync {where}/offline-run-*",
        file=sys.stderr,
        flush=True,
    )


def no_server(base_url: str, api_key: str | None, seconds: float) -> str | None:
    """Return why the server cannot be used; None if it answers within so many seconds."""
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
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            reasons.append(None)  # an answer
        except (OSError, ValueError) as error:
            reasons.append(f"{silence} ({error})")
        else:
            reasons.append(None)

    # In a thread, as the timeout does not cover the DNS lookup, which may take a minute.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return reasons[0] if reasons else f"{silence} within {seconds:g} s"


def _known_id(folder: Path) -> str:
    path = folder / WANDB_RUN_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else "none"


def without_home(value: Any) -> Any:
    """Return a value without the user's home folder, which dashboards show to others."""
    home = str(Path.home())
    return value.replace(home, "~") if isinstance(value, str) and home != "/" else value
