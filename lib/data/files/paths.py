"""Find the files of rows that a flag or a folder names. Imported before the slow libraries."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# Endings after that of the format, with the names that Arrow has for them.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

KNOWN = f"{', '.join(FORMATS)}, and {', '.join(COMPRESSIONS)} after all but the last"

# Other names of a split, as GLUE's own archives and many others have them.
VALIDATION_NAMES = ("dev", "valid", "val")


def format_of(path: Path) -> tuple[str, str | None]:
    """Return the format that a file's name ends in, and Arrow's name of its compression.

    Raises:
        InputError: the name does not tell.
    """
    name, compression = path.name.lower(), None
    for ending, codec in COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), codec
    for ending in FORMATS:
        if name.endswith(ending) and not (compression and ending == ".parquet"):
            return ending, compression
    raise InputError(f"{path}: its extension does not name a format; known: {KNOWN}")


def expand(flag: str, patterns: Sequence[str]) -> list[Path]:
    """Return the files that the values of a flag stand for: files, globs, and folders of files.

    Raises:
        InputError: a value stands for no file, or for one that cannot hold rows.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = data_files(path)
            if not found:
                raise InputError(f"{flag} {path}: the folder holds no file of rows; known: {KNOWN}")
        elif not path.exists() and glob.has_magic(pattern):
            matches = map(Path, sorted(glob.glob(pattern, recursive=True)))
            found = [path for path in matches if path.is_file()]
            if not found:
                raise InputError(f"{flag} {pattern}: no file has such a name")
        else:
            found = [path]
        files += found
    for number, path in enumerate(files):
        _check(flag, path)
        if path.resolve() in [other.resolve() for other in files[:number]]:
            raise InputError(f"{flag} names {path} twice: its rows would count double")
    return files


def _check(flag: str, path: Path) -> None:
    try:
        format_of(path)
    except InputError as error:
        raise InputError(f"{flag} {error}") from None
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder: give files")
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file (looked in {path.absolute().parent})")
    if path.stat().st_size == 0:
        raise InputError(f"{flag} {path} is empty: it needs at least one row")


def data_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder whose names end in a known format, sorted."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and _is_known(path)]


def _is_known(path: Path) -> bool:
    try:
        format_of(path)
    except InputError:
        return False
    return not path.name.startswith(".")


def split_files(folder: Path, task_name: str | None) -> dict[str, list[Path]]:
    """Return the files of each split in a folder, as `hf download` and others lay them out.

    They lie in the folder of the configuration (`mrpc/`), in `data/`, in `default/`, or in the
    folder itself: `train.csv`, `train-00000-of-00002.parquet`, or `train/0000.parquet`.

    Raises:
        InputError: a split has files of several formats.
    """
    splits: dict[str, list[Path]] = {}
    for place in (folder / (task_name or "data"), folder / "data", folder / "default", folder):
        if not place.is_dir():
            continue
        splits = _split_files_in(place)
        if "train" in splits:
            break
    for split, files in splits.items():
        by_format = {format_of(path)[0]: path for path in files}
        if len(by_format) > 1:
            names = " and ".join(map(str, by_format.values()))
            raise InputError(f"{names} both hold rows of the {split} split: keep one format")
    return splits


def _split_files_in(place: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in data_files(place):
        splits.setdefault(_split_name(re.split(r"[-.]", path.name)[0]), []).append(path)
    for inner in sorted(place.iterdir()):
        name = _split_name(inner.name)
        if name.startswith(("train", "validation", "test")) and inner.is_dir():
            splits.setdefault(name, []).extend(data_files(inner))
    return splits


def _split_name(name: str) -> str:
    first, mark, rest = name.partition("_")
    return f"validation{mark}{rest}" if first in VALIDATION_NAMES else name


def shown(values: Sequence[str]) -> str:
    """Return the names of files without their folders, as a header has room for them."""
    first = Path(values[0]).name
    return first if len(values) == 1 else f"{first} and {len(values) - 1} more"
