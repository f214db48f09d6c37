"""The output folder: whose it is, and writing into it so that nothing is half written."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lib.errors import InputError

CONFIG_FILE = "config.yaml"
RESULT_FILES = ("all_results.json", "manifest.json")


def check_free(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Refuse a folder that somebody else uses, or that cannot be written; writes nothing.

    Raises:
        InputError: it holds another run or other files, or it cannot be made.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"--output_dir {folder}: {parent} cannot be written; choose another folder"
        )
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found and CONFIG_FILE not in found:
        raise InputError(
            f"--output_dir {folder} already holds files that are not of a run "
            f"({', '.join(found[:3])}): choose another folder"
        )
    if found and not (overwrite or resuming):
        raise InputError(
            f"--output_dir {folder} already holds a run: choose another folder, go on with "
            "--resume_from_checkpoint, or replace the files of that run with "
            "--overwrite_output_dir"
        )


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the folder, and write there whose it is.

    Raises:
        InputError: it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The results of a run that is replaced would look like this run's.
        for name in RESULT_FILES:
            (folder / name).unlink(missing_ok=True)
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


@contextlib.contextmanager
def replacing(path: Path, *, main: bool = True) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to; moved into place if all went well.

    A reader sees the old contents or the new ones, and a run that is killed leaves the old. Where
    several processes write one folder, only the `main` one clears and moves it.
    """
    beside = path.with_name(f".{path.name}.writing")
    if not main:
        yield beside
        return
    _remove(beside)
    with writing(path):
        try:
            yield beside
            if beside.is_dir() and path.is_dir():
                old = path.with_name(f".{path.name}.old")
                _remove(old)
                path.rename(old)
                beside.rename(path)
                _remove(old)
            else:
                beside.replace(path)
        finally:
            _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
