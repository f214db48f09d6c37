"""The output folder of a run: its lock, its checkpoints and its status."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import yaml

from lib.checkpoints import manifest
from lib.checkpoints.atomic import (
    REMOVED,
    REPLACED,
    WRITING,
    beside,
    check_space,
    discard,
    recover,
    remove,
    write_json,
    write_text,
    write_yaml,
    writing,
)
from lib.cli.resuming import LONGER_FLAGS, check_same_run
from lib.errors import InputError, LostProcessError, Preempted

LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"
STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "all_results.json"
PROVENANCE_FILE = "manifest.json"
# The positions, from 0, of the validation rows among the training rows that they were cut from.
HELD_OUT_FILE = "validation_rows.json"
WANDB_RUN_FILE = "wandb_run_id"
WANDB_ALERTS_FILE = "wandb_alerts"
# What --per_device_train_batch_size auto found; without it the next start would search again.
MICRO_BATCH_FILE = "micro_batch_size"
# What --profile writes, which only --overwrite_output_dir deletes.
PROFILE_FOLDER = "profile"
PROFILE_FILES = f"{PROFILE_FOLDER}/updates_*_to_*"

# What file systems without locks answer, such as some NFS mounts.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Results of a finished run, which are deleted when another run claims the folder.
RESULT_FILES = (
    RESULTS_FILE,
    PROVENANCE_FILE,
    HELD_OUT_FILE,
    "report/index.html",
    "report/data.json",
)

# Seconds to wait for the processes of an earlier start: Slurm kills them 30 s after it asked them
# to end, and an NFS server takes back the locks of a lost node after 90 s.
SECONDS_TO_END = 120.0


class RunFolder:
    """An output folder, which a run locks while it trains; `failed` in status.json if it raises.

    Args:
        path: the folder.
        overwrite: whether to replace another run in it. A command that torchrun or Slurm starts
            again does not replace what its first start left.
        resume_from: a checkpoint, or None or "auto" for the newest good one in the folder.

    Attributes:
        started: when the run began, by `time.perf_counter`.
        pending: a checkpoint that is being written, for which the lock is kept.
    """

    def __init__(self, path: str, *, overwrite: bool, resume_from: str | None) -> None:
        self.started = time.perf_counter()
        self.path = Path(path)
        self.resume_from = resume_from
        self.lock = FolderLock(self.path)
        self.claimed = False
        self.pending: Future[None] | None = None
        started_again = any(
            int(os.environ.get(name, "0")) > 0
            for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        )
        self.restarted = started_again and read_status(self.path).get("started_by") == _started_by()
        self.ignores_overwrite = overwrite and self.restarted
        self.overwrite = overwrite and not self.restarted
        self.seconds_to_lock = SECONDS_TO_END if started_again else 0.0

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unwritten = self.pending and self.pending.exception()
        if unwritten and str(unwritten) != str(error):  # the run ends for another reason
            print(f"the last checkpoint is missing: {unwritten}", file=sys.stderr)
        # A run that lost a process is to be started again, as one that was killed.
        resumable = isinstance(error, Preempted | LostProcessError | SystemExit)
        if self.claimed and error is not None and not resumable:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            update = max(
                (found["update"] for found in manifest.owned(self.path).values()), default=0
            )
            with contextlib.suppress(InputError):  # the disk may be what failed; it is on stderr
                self.write_status("failed", update, reason=reason)
        self.lock.release()

    def earlier_config(self) -> dict[str, Any]:
        """Return the configuration of the run that resumes; empty if none does.

        Raises:
            InputError: as `read_config`.
        """
        return {} if self.overwrite else read_config(self.path) or {}

    def check_available(self, config: Mapping[str, Any]) -> None:
        """Check that this run may use the folder; writes nothing.

        Raises:
            InputError: it holds files that are not of a run, or another run, or cannot be written.
        """
        folder = self.path
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir():
            raise InputError(f"--output_dir {folder}: {parent} is a file; choose another folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(
                f"--output_dir {folder}: {parent} cannot be written; choose another folder"
            )
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if set(found) - {LOCK_FILE, beside(folder / STATUS_FILE).name} and not read_status(folder):
            raise InputError(
                f"--output_dir {folder} already holds files that are not of a run "
                f"({', '.join(found[:3])}): choose another folder"
            )
        before = None if self.overwrite else read_config(folder)
        if before is not None:
            check_same_run(before, config, folder)

    def claim(
        self,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        num_checkpoints: int,
        num_parameters: int,
    ) -> Path | None:
        """Lock the folder for this run, and return the checkpoint to resume from, if any.

        Args:
            config: for config.yaml.
            identity: what the run is a function of.
            num_checkpoints: that will be on the disk at the same time.
            num_parameters: of the model.

        Raises:
            InputError: another process writes there, the folder cannot be written, the disk is
                too small, the checkpoint is damaged or of another run, or a finished run has no
                checkpoint left.
        """
        if self.ignores_overwrite:
            print("restarted by the launcher: resuming instead of overwriting", file=sys.stderr)
        source = self._find_checkpoint(identity)
        existing = manifest.owned(self.path)
        # A checkpoint has the weights and AdamW's two moments, in fp32.
        needed = num_checkpoints * num_parameters * 12
        check_space(self.path, needed - sum(map(_size, existing)))
        self.lock.acquire(seconds=self.seconds_to_lock)
        if self.overwrite:
            for path in existing:
                if source is None or path.resolve() != source.resolve():
                    discard(path)
            names = (METRICS_FILE, WANDB_RUN_FILE, WANDB_ALERTS_FILE, MICRO_BATCH_FILE)
            for path in (path for name in (*names, PROFILE_FILES) for path in self.path.glob(name)):
                path.unlink()
        update = 0 if source is None else manifest.read(source)["update"]
        self.write_status("running", update)
        self.claimed = True
        with writing(self.path):
            for name in RESULT_FILES:
                (self.path / name).unlink(missing_ok=True)
            # Half-written files of a killed process.
            for suffix in (WRITING, REPLACED, REMOVED):
                for path in (*self.path.glob(f".*{suffix}"), *self.path.glob(f"*/.*{suffix}")):
                    remove(path)
        write_yaml(self.path / CONFIG_FILE, config)
        return source

    def _find_checkpoint(self, identity: Mapping[str, Any]) -> Path | None:
        """The checkpoint to resume from; None to start from the beginning.

        A command that is started again has come further than the checkpoint that it names.
        """
        status = read_status(self.path)
        if status:
            self.lock.acquire(seconds=self.seconds_to_lock)
            recover(self.path)
        named = None if self.resume_from in (None, "auto") else Path(str(self.resume_from))
        newest = None
        if (named is None and not self.overwrite) or self.restarted:
            newest, remarks = manifest.newest(self.path)
            for remark in remarks:
                print(f"skipped: {remark}", file=sys.stderr)
        if newest is None and named is not None:
            newest = named, manifest.verify(named)
        if newest is None:
            self._check_restart(status)
            return None
        source, content = newest
        check_same_run(content["run"], identity, source)
        print(f"resuming from {source}, after update {content['update']}", flush=True)
        for name in LONGER_FLAGS:
            before, now = content["run"][name], identity[name]
            if before != now:
                print(
                    f"{name} was {before} and is {now} now: from here on the learning rate follows "
                    "the longer schedule"
                )
        return source

    def _check_restart(self, status: Mapping[str, Any]) -> None:
        """Say that a run starts from the beginning; refuse where that would lose its results."""
        if self.overwrite:
            return
        if status.get("status") == "finished":
            config = read_config(self.path) or {}
            removed = " (--save_only_model removed them)" if config.get("save_only_model") else ""
            raise InputError(
                f"--output_dir {self.path} holds a finished run without its checkpoints{removed}, "
                "which would train anew and replace its results: choose another folder, or give "
                "--overwrite_output_dir"
            )
        if self.resume_from or (self.path / CONFIG_FILE).exists():
            print(f"no checkpoint in {self.path}: starting from the beginning")

    def check_shared(self) -> None:
        """Check that this machine sees the folder that the main process has just claimed.

        Raises:
            InputError: it does not see it.
        """
        if not (self.path / CONFIG_FILE).exists():
            raise InputError(
                f"--output_dir {self.path} is not shared by all machines: give a folder that is"
            )

    def found_micro_batch_size(self, source: Path | None) -> int | None:
        """Return the rows of a micro-batch that an earlier start found to fit, or None.

        Args:
            source: the checkpoint that the run resumes from, maybe in the folder of another.

        Raises:
            InputError: the file cannot be read.
        """
        path = (self.path if source is None else source.parent) / MICRO_BATCH_FILE
        try:
            size = int(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it") from error
        self.keep_micro_batch_size(size)
        return size

    def keep_micro_batch_size(self, size: int) -> None:
        """Keep the rows of a micro-batch that fit, for later starts of this run.

        Raises:
            InputError: the folder cannot be written.
        """
        write_text(self.path / MICRO_BATCH_FILE, f"{size}\n")

    def write_status(self, status: str, update: int, **more: str) -> None:
        """Write how the run stands: running, preempted (run it again), finished or failed.

        For batch scripts, as not every launcher passes on an exit status.
        """
        content = {"status": status, "update": update, "started_by": _started_by(), **more}
        write_json(self.path / STATUS_FILE, content)

    def discard_checkpoints(self) -> None:
        """Remove all checkpoints of the run.

        Raises:
            InputError: the folder cannot be written.
        """
        with writing(self.path):
            for path in manifest.owned(self.path):
                discard(path)


class FolderLock:
    """Keeps an output folder to one run, until it is released or its process ends.

    The lock file holds the name of the process, for the message to the next one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self.lock = filelock.FileLock(self.path, poll_interval=0.5, fallback_to_soft=False)
        self.supported = True

    def acquire(self, *, seconds: float) -> None:
        """Create and lock the folder, waiting up to `seconds` for a process that holds it.

        Raises:
            InputError: another process holds it, or it cannot be written.
        """
        if self.lock.is_locked or not self.supported:
            return
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=seconds)
            except filelock.Timeout as error:
                holder = self.path.read_text(encoding="utf-8").strip()
                raise InputError(
                    f"{self.folder} is in use by another run ({holder}): wait for it, stop it, or "
                    "choose another folder"
                ) from error
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                print(f"{self.path} cannot be locked: start one run at a time", file=sys.stderr)
                self.supported = False
                return
            # In place: a new file would not be the one that is locked.
            self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        """Let the next run have the folder."""
        self.lock.release()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _started_by() -> str | None:
    """Identify the job or launch that started this process; None without Slurm and torchrun."""
    job, launch = (os.environ.get(name) for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    if job is None and launch is None:
        return None
    # Other launches may have the same ID; the launcher of this one survives its restarts.
    return job or f"{launch} {socket.gethostname()} {os.getppid()}"


def read_status(folder: Path) -> dict[str, Any]:
    """Return the contents of status.json; empty if the folder is not that of a run."""
    try:
        content = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) and "status" in content else {}


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in a folder; None if there is none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}; choose another folder") from error
    return content if isinstance(content, dict) else {}
