"""Where a run goes on: whose the output folder is, and which checkpoint it goes on from."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.checkpoints import checkpoint, output
from lib.checkpoints.lock import Lock
from lib.cli.config import MAY_GROW, check_same_run
from lib.distributed.collectives import restarted
from lib.errors import InputError
from lib.tracking.run_log import METRICS_FILE
from lib.tracking.trackers import forget_run

# For the processes of an earlier start: Slurm kills them 30 s after it asked them to end, and an
# NFS server takes back the locks of a lost node after 90 s.
SECONDS_TO_END = 120.0


def started_again(folder: Path) -> bool:
    """Whether a launcher or Slurm started the command line again that wrote to the folder."""
    started_by = output.read_status(folder).get("started_by")
    return restarted() and started_by == output.started_by()


def check_free(folder: Path, config: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that is not for this run, before anything is written.

    Raises:
        InputError: it holds files of somebody else or another run, or cannot be written.
    """
    output.check_free(folder)
    before = None if overwrite else output.read_config(folder)
    if before is not None:
        check_same_run(before, config, folder)


def find_checkpoint(
    folder: Path, asked: str | None, run: Mapping[str, Any], lock: Lock, *, overwrite: bool
) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its update; None and 0 start from the beginning.

    A command that is started again has come further than the checkpoint that it names.

    Args:
        folder: the output folder.
        asked: a checkpoint, or None or "auto" for the newest good one.
        run: what the run is a function of.

    Raises:
        InputError: the one that was asked for is damaged, or it is of another run.
    """
    if output.read_status(folder):
        _take(lock)
        output.recover(folder)
    newest = None
    if (asked in (None, "auto") and not overwrite) or started_again(folder):
        newest, remarks = checkpoint.newest(folder)
        for remark in remarks:
            print(f"passed over: {remark}", file=sys.stderr)
    if newest is None and asked not in (None, "auto"):
        newest = Path(asked), checkpoint.verify(Path(asked))
    if newest is None:
        if not overwrite and (asked or (folder / output.CONFIG_FILE).exists()):
            print(f"no checkpoint in {folder} to go on from: starting from the beginning")
        return None, 0
    source, manifest = newest
    check_same_run(manifest["run"], run, source)
    print(f"going on from {source}, after update {manifest['update']}", flush=True)
    for name in MAY_GROW:
        if manifest["run"][name] != run[name]:
            print(
                f"{name} {manifest['run'][name]} there, {run[name]} here: from here on the "
                "learning rate is that of the longer run"
            )
    return source, manifest["update"]


def claim(
    folder: Path,
    config: Mapping[str, Any],
    source: Path | None,
    update: int,
    lock: Lock,
    *,
    overwrite: bool,
) -> None:
    """Make the folder this run's, which goes on from `source`, after `update`.

    Args:
        overwrite: whether to remove what an earlier run left, but for `source`.

    Raises:
        InputError: another process is writing there, or it cannot be written.
    """
    _take(lock)
    if overwrite:
        for path in checkpoint.owned(folder):
            if source is None or path.resolve() != source.resolve():
                output.discard(path)
        (folder / METRICS_FILE).unlink(missing_ok=True)
        forget_run(folder)
    output.claim(folder, config, update)


def check_shared(folder: Path) -> None:
    """See that this machine has the folder that the main process has just claimed.

    Raises:
        InputError: it has not.
    """
    if not (folder / output.CONFIG_FILE).exists():
        raise InputError(
            f"--output_dir {folder} is not shared by all machines: give a folder that is"
        )


def _take(lock: Lock) -> None:
    lock.acquire(seconds=SECONDS_TO_END if restarted() else 0)
