"""The output folder: whose it is, and writing into it so that nothing is half written."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lib.errors import InputError

CONFIG_FILE = "config.yaml"
STATUS_FILE = "status.json"
LOCK_FILE = ".lock"
RESULTS_FILE = "all_results.json"
MANIFEST_FILE = "manifest.json"
# What a finished run leaves, and a replaced one must not.
RESULT_FILES = (RESULTS_FILE, MANIFEST_FILE, "report/index.html")


def check_free(folder: Path) -> None:
    """Refuse a folder with files of somebody else, or that cannot be written; writes nothing.

    Raises:
        InputError: it holds other files than a run's, or it cannot be made.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
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


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote; nothing if the folder is not that of a run."""
    try:
        content = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) and "status" in content else {}


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run that a folder holds; None if it holds none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}; choose another folder") from error
    return content if isinstance(content, dict) else {}


def claim(folder: Path, config: Mapping[str, Any], update: int) -> None:
    """Write whose the folder is, and that a run goes on there after `update`.

    Raises:
        InputError: it cannot be written.
    """
    write_status(folder, "running", update)
    with writing(folder):
        # The results of a run that is replaced would look like this run's.
        for name in RESULT_FILES:
            (folder / name).unlink(missing_ok=True)
        # What a killed process left half written.
        for end in (WRITING, REPLACED, REMOVED):
            for path in folder.glob(f".*{end}"):
                remove(path)
    write_yaml(folder / CONFIG_FILE, config)


REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write",
    errno.EPERM: "choose a folder that you may write",
    errno.ENOENT: "choose a folder whose parents can be made",
    errno.ENOTDIR: "choose a folder whose parents are folders",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the path and the remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number not in REMEDIES:
            raise
        where = getattr(error, "filename", None) or path
        raise InputError(
            f"cannot write {where}: {os.strerror(number)}; {REMEDIES[number]}"
        ) from error


def _error_number(error: OSError | SafetensorError | RuntimeError) -> int:
    """The system's number of an error; safetensors and torch give it in words, or not at all."""
    if isinstance(error, OSError):
        return error.errno or 0
    if "PytorchStreamWriter failed writing" in str(error):
        return errno.ENOSPC
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


# Ends of the names of what is being written, replaced or removed; nobody else's end so.
WRITING, REPLACED, REMOVED = (f".train_mrpc.{state}" for state in ("writing", "old", "removed"))


def beside(path: Path) -> Path:
    """Where to write what shall get the name `path` when it is complete."""
    return path.with_name(f".{path.name}{WRITING}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to; moved into place if all went well.

    A reader sees the old contents or the new ones, also after a power failure.
    """
    with writing(path):
        try:
            yield beside(path)
            move_into_place(path)
        finally:
            remove(beside(path))


def move_into_place(path: Path) -> None:
    """Give what was written beside `path` its name, once all of it is on the disk."""
    new = beside(path)
    for part in [*new.rglob("*"), new] if new.is_dir() else [new]:
        _flush(part)
    old = path.with_name(f".{path.name}{REPLACED}")
    if path.is_dir():
        remove(old)
        path.rename(old)
    new.replace(path)
    _flush(path.parent)
    remove(old)


def recover(folder: Path) -> None:
    """Give back their names to what was about to be replaced, and was not."""
    for old in folder.glob(f".*{REPLACED}"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if not path.exists():
            with writing(path):
                old.rename(path)


def discard(folder: Path) -> None:
    """Remove a folder; while it is half removed it does not have its name any more."""
    removed = folder.with_name(f".{folder.name}{REMOVED}")
    remove(removed)
    remove(folder.rename(removed))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def write_status(folder: Path, status: str, update: int) -> None:
    """Write how the run stands: running, preempted (run it again) or finished.

    For batch scripts, as not every launcher passes an exit status on.
    """
    content = {"status": status, "update": update, "started_by": started_by()}
    write_json(folder / STATUS_FILE, content)


def started_by() -> str | None:
    """What tells the starts of one job from those of another; None without Slurm and torchrun."""
    job, launch = (os.environ.get(name) for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    if job is None and launch is None:
        return None
    # Other launches may have the same ID; the launcher of this one stays while it starts anew.
    return job or f"{launch} {socket.gethostname()} {os.getppid()}"
