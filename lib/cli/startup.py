"""What has to happen before the slow imports, and how a run ends."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.backends import deepspeed, settings
from lib.cli.config import TrainConfig
from lib.cli.parsing import parse_arguments
from lib.cli.rules import resolve
from lib.data.files.paths import expand, shown
from lib.distributed.signals import ignore_stop_signals
from lib.errors import (
    TRY_AGAIN,
    InputError,
    LostProcessError,
    NonFiniteError,
    Preempted,
    PublishError,
)
from lib.hub.reach import go_offline_if_unreachable
from lib.hub.upload import check_name

# `finished_lines` of lib/finished.py, which imports this wing.
FinishedLines = Callable[[Mapping[str, Any], str | None, Iterable[Path]], list[str] | None]


def start(arguments: list[str], finished_lines: FinishedLines | None = None) -> TrainConfig:
    """Read the command line, and prepare the environment that the libraries read when imported.

    Stops the garbage collector, which would go through all that the imports make, for a quarter of
    their time, and find nothing: use `running` after them.

    Args:
        arguments: those of the process, in which a token is overwritten.

    Raises:
        SystemExit: with status 2 after one line, if the run cannot start; with status 0 if it is
            finished.
    """
    with exit_status():
        config = parse_arguments(arguments[1:])
        hide_token(arguments)
        if config.hub_token:
            hide_from_process_list(config.hub_token)
            os.environ["HF_TOKEN"] = config.hub_token
        settings.check(os.environ, config.gradient_accumulation_steps)
        settings.use_precision(os.environ, config.mixed_precision)
        deepspeed.check_settings()
        if finished_lines is not None:
            exit_if_finished(config, finished_lines)
        go_offline_if_unreachable(
            config.model_name_or_path,
            config.model_revision,
            config.dataset_name if config.train_file is None else None,
        )
        if config.push_options() is not None:  # imports what reads HF_HUB_OFFLINE
            check_name(config.hub_model_id or Path(config.output_dir).resolve().name)
    settings.use_own_device(os.environ)
    settings.tune_cpu(os.environ)
    if prints():
        print(f"train_mrpc: {header(config)}", flush=True)
    gc.disable()
    return config


def prints() -> bool:
    """True in the process that prints for all, before they have met."""
    return os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None


def exit_if_finished(config: TrainConfig, finished_lines: FinishedLines) -> None:
    """Print the results of this run and exit, if it is finished and there is nothing to do."""
    named = config.resume_from_checkpoint not in (None, "auto")
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("1", os.environ.get("LOCAL_WORLD_SIZE")):
        return  # several machines may not see the same files at the same time
    if named or config.overwrite_output_dir or config.dry_run or config.push_to_hub:
        return
    try:
        resolved, _ = resolve(config, int(processes), {})
    except InputError:
        return  # raised again for the number of processes that meet
    automatic = config.mixed_precision == "auto"  # keeps the precision that the run has
    precision = None if automatic else os.environ.get(settings.MIXED_PRECISION, "no")
    lines = finished_lines(resolved.to_dict(), precision, sources(config))
    if lines is not None:
        if prints():
            print("\n".join(lines), flush=True)
        sys.exit(0)


def sources(config: TrainConfig) -> Iterator[Path]:
    """Yield the files of rows on this machine, and the folders that they were found in."""
    if config.train_file is None:
        folder = Path(config.dataset_name)
        if folder.exists():
            yield from (folder, *folder.rglob("*"))
    for name in ("train_file", "validation_file", "test_file"):
        for given in getattr(config, name) or ():
            found = expand(f"--{name}", [given])
            yield from found
            if found != [Path(given)]:
                yield from (path.parent for path in found)  # changed if a file is gone


def header(config: TrainConfig) -> str:
    """Name the model, the data and the output folder: `bert-base-uncased on mrpc -> outputs/mrpc`.

    Printed at once, as importing PyTorch and reading the model take seconds.
    """
    model = Path(config.model_name_or_path).name
    data = shown(config.train_file or (config.dataset_name,))
    task = "" if config.train_file or config.demo else f" ({config.task_name or 'mrpc'})"
    target = "dry run" if config.dry_run else config.output_dir
    return f"{model} on {data}{task} -> {target}"


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run after the slow imports: collect garbage again, but not theirs; ends as `exit_status`."""
    gc.freeze()
    gc.enable()
    with exit_status():
        yield


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Turn the project's errors into one line and an exit status: 2, 1, or 75 after a signal.

    Leaves the process group, but not after the loss of another process.

    Once the process group exists all ranks raise the same error, and rank 0 prints it. Before that
    an error may concern one machine, and the first process of each prints it.

    Raises:
        SystemExit: instead of those errors.
    """
    try:
        yield
    except (InputError, NonFiniteError, LostProcessError, PublishError, Preempted) as error:
        grouped = _distributed() is not None
        stopped = isinstance(error, Preempted)
        rank = os.environ.get("RANK" if grouped or stopped else "LOCAL_RANK", "0")
        if int(rank) <= 0 or isinstance(error, LostProcessError):
            kind = "" if stopped else "error: "
            print(f"train_mrpc.py: {kind}{error}", file=sys.stderr, flush=True)
        ignore_stop_signals()
        if not isinstance(error, LostProcessError):
            _leave_process_group()
        sys.exit(TRY_AGAIN if stopped else 2 if isinstance(error, InputError) else 1)
    else:
        _leave_process_group()


def _leave_process_group() -> None:
    """Destroy the process group, if there is one; all processes have to.

    A thread of gloo that waits for the GIL while Python finalizes, to release a collective that
    has just ended, would abort the process.
    """
    distributed = _distributed()
    if distributed is not None:
        distributed.destroy_process_group()


def _distributed() -> ModuleType | None:
    """`torch.distributed`, if it is imported and has a process group."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None


def hide_token(arguments: list[str]) -> None:
    """Overwrite the value of --hub_token in `sys.argv`, which wandb and the manifest record."""
    for position, word in enumerate(arguments):
        name, equals, _ = word.replace("-", "_").partition("=")
        if name == "__hub_token" and equals:
            arguments[position] = "--hub_token=***"
        elif name == "__hub_token" and position + 1 < len(arguments):
            arguments[position + 1] = "***"


def hide_from_process_list(token: str) -> None:
    """Overwrite a token where Linux shows the command line of this process to all users.

    Raises:
        InputError: a launcher shows it too, whose memory is its own.
    """
    processes, secret = Path("/proc"), token.encode()
    if not (processes / "self" / "cmdline").exists():
        return
    launcher = processes / str(os.getppid()) / "cmdline"
    # A container's first process has no parent, and that of another user may be hidden.
    if os.access(launcher, os.R_OK) and secret in launcher.read_bytes():
        raise InputError(
            "--hub_token stands in the process list, as the command of the launcher: set HF_TOKEN "
            "in the environment instead"
        )
    shown = (processes / "self" / "cmdline").read_bytes()
    # Field 48, arg_start, of proc_pid_stat(5); the first after the name in parentheses is field 3.
    start = int((processes / "self" / "stat").read_text().rpartition(")")[2].split()[48 - 3])
    while start and (position := shown.find(secret)) >= 0:
        ctypes.memset(start + position, ord("*"), len(secret))
        shown = (processes / "self" / "cmdline").read_bytes()
