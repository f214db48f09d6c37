"""The manifest of a checkpoint: what it belongs to, and whether its files are unmodified."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.checkpoints.atomic import write_json
from lib.errors import InputError

MANIFEST_FILE = "manifest.json"
FORMAT = 3


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Describe the files of a checkpoint by size and SHA-256, beside `content`.

    Raises:
        InputError: the manifest cannot be written.
    """
    described = {"format": FORMAT, **content, "files": file_entries(folder)}
    write_json(folder / MANIFEST_FILE, {**described, "checksum": digest(described)})


def read(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, without looking at its files.

    Raises:
        InputError: there is none, or it was altered, or it has another format.
    """
    file = path / MANIFEST_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is not a checkpoint of this script: it has no {MANIFEST_FILE}"
        ) from error
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST_FILE} was altered") from error
    if checksum != digest(content):
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST_FILE} was altered")
    if content["format"] != FORMAT:
        raise InputError(
            f"checkpoint {path} has format {content['format']}, this version reads {FORMAT}: "
            "resume with the version that wrote it"
        )
    assert isinstance(content, dict)
    return content


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, all of whose files are unmodified.

    Raises:
        InputError: a file is missing, truncated or altered; the message names it.
    """
    manifest = read(path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                raise InputError(
                    f"checkpoint {path} is damaged: {name} has {size} bytes instead of "
                    f"{expected['size']}"
                )
            if sha256(file) != expected["sha256"]:
                raise InputError(f"checkpoint {path} is damaged: {name} was altered (SHA-256)")
        except FileNotFoundError as error:
            raise InputError(f"checkpoint {path} is damaged: {name} is missing") from error
        except OSError as error:
            raise InputError(f"checkpoint {path}: {name} cannot be read: {error}") from error
    return manifest


def owned(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the checkpoints in an output folder with their manifests, unverified.

    A folder whose manifest cannot be read may not be ours, and is left out.
    """
    found = {}
    for path in _candidates(folder):
        with contextlib.suppress(InputError):
            found[path] = read(path)
    return found


def newest(folder: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """Return the newest good checkpoint with its manifest, and why each newer one was skipped.

    A folder whose manifest cannot be read has no known age, and is always mentioned.
    """
    candidates = []
    remarks = []
    for path in _candidates(folder):
        try:
            candidates.append((read(path)["update"], path))
        except InputError as error:
            remarks.append(str(error))
    for _, path in sorted(candidates, reverse=True):
        try:
            return (path, verify(path)), remarks
        except InputError as error:
            remarks.append(str(error))
    return None, remarks


def _candidates(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints."""
    return [
        path
        for path in sorted(folder.glob("*_*"))
        if re.fullmatch(r"(step|epoch)_\d+", path.name) and path.is_dir()
    ]


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of each file in a folder, by relative path."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Return the SHA-256 of the contents of a file."""
    checksum = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()
