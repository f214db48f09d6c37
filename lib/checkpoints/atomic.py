"""Writing files so that a reader sees the old contents or the new ones, never half of them."""

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

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write",
    errno.EPERM: "choose a folder that you may write",
    errno.ENOENT: "choose a folder whose parent folders can be created",
    errno.ENOTDIR: "part of the path is a file: choose another folder",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into an error that names the path and the remedy.

    Raises:
        InputError: the disk is full or read-only, or the path may not be written.
    """
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
    """The errno of an error; safetensors and torch give it in words, or not at all."""
    if isinstance(error, OSError):
        return error.errno or 0
    if "PytorchStreamWriter failed writing" in str(error):
        return errno.ENOSPC
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


# Suffixes of what is being written, replaced or removed; nobody else uses them.
WRITING, REPLACED, REMOVED = (f".train_mrpc.{state}" for state in ("writing", "old", "removed"))


def beside(path: Path) -> Path:
    """The path to write to until the contents of `path` are complete."""
    return path.with_name(f".{path.name}{WRITING}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, and move it to `path` if all went well.

    A reader sees the old contents or the new ones, also after a power failure.

    Raises:
        InputError: as `writing`.
    """
    with writing(path):
        try:
            yield beside(path)
            move_into_place(path)
        finally:
            remove(beside(path))


def move_into_place(path: Path) -> None:
    """Flush what was written beside `path` to the disk, then rename it to `path`."""
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
    """Rename back what a killed process had moved aside and not replaced."""
    for old in folder.glob(f".*{REPLACED}"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if not path.exists():
            with writing(path):
                old.rename(path)


def discard(folder: Path) -> None:
    """Remove a folder, under another name, so that it is never half there under its own."""
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
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file; raises `InputError` as `writing`."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a YAML file, keeping the order of the keys."""
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def link(source: Path, target: Path) -> None:
    """Make a hard link, safe as files here are never modified in place; a copy where that fails."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes in a folder, which need not exist yet.

    Raises:
        InputError: there is too little space.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"cannot write {folder}: the run needs some {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free; free some space, choose another --output_dir, or "
            "lower --checkpoints_to_keep"
        )
