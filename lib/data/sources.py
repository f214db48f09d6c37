"""Read a data set of the hub, a folder or files into Arrow files that are mapped into memory."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset
from datasets.packaged_modules.cache.cache import Cache

from lib.data.files.cache import arrow_file, cached_rows, content_hash, write_arrow
from lib.data.files.formats import READER_VERSION, first_line, read_tables
from lib.data.files.paths import format_of, split_files
from lib.data.files.place import Place
from lib.data.tasks import TASKS
from lib.errors import InputError
from lib.hub.client import reason_of
from lib.hub.download import download_dataset_files
from lib.hub.reach import REMEDY, cached_dataset

# The splits that a run reads of a folder, which may hold others.
SPLITS = {"train"}.union(*((*task.validation, *task.test) for task in TASKS.values()))


@dataclasses.dataclass(frozen=True)
class RawSplit:
    """The rows of a split as they were found, and where."""

    rows: Dataset
    place: Place


def read_splits(
    source: str | Mapping[str, str | Sequence[str]],
    task_name: str | None,
    *,
    revision: str | None = None,
) -> dict[str, RawSplit]:
    """The raw rows of each split.

    Args:
        source: a data set of the hub, a local folder, `demo`, or the files of each split.
        task_name: the configuration of a data set.

    Raises:
        InputError: it does not exist, cannot be read, or is not what its name says.
    """
    if not isinstance(source, str):
        return {
            split: _read_files([paths] if isinstance(paths, str) else paths)
            for split, paths in source.items()
        }
    folder = Path(source)
    if source == "demo":
        from lib.demo.corpus import corpus_folder, write_corpus

        folder = write_corpus(corpus_folder())
    if folder.is_dir():
        return _read_folder(folder, source, task_name)
    if source.startswith((".", "/", "~")):
        raise InputError(f"--dataset_name {source}: no such folder")
    try:
        builder = _builder(source, task_name, revision)
        data_files = (builder.config.data_files or {}).values()
        download_dataset_files(source, itertools.chain.from_iterable(data_files))
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Offline, `datasets` reads only what it prepared itself, not what `hf download` fetched.
        if datasets.config.HF_HUB_OFFLINE and (
            snapshot := cached_dataset(source, task_name, revision)
        ):
            return _read_folder(snapshot, source, task_name)
        # Without a hub `datasets` raises ConnectionError, FileNotFoundError or ValueError,
        # depending on what is cached and on HF_HUB_OFFLINE; RuntimeError for a script.
        raise InputError(
            f"--dataset_name {source} ({task_name}) is neither cached nor available from the hub: "
            f"{reason_of(error)}; {REMEDY}"
        ) from error
    return _splits_of(splits, source)


def _builder(name: str, task_name: str | None, revision: str | None) -> datasets.DatasetBuilder:
    """The builder of a data set of the hub; without the hub, of the very commit that was asked for.

    By itself `datasets` takes the newest that is cached, whatever the revision.
    """
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    prepared = list(cached.glob(f"{task_name or 'default'}/*/{revision}")) if revision else []
    if datasets.config.HF_HUB_OFFLINE and prepared:
        return Cache(
            repo_id=name,
            dataset_name=name.rpartition("/")[2],
            config_name=task_name or "default",
            version=prepared[0].parent.name,
            hash=revision,
        )
    builder = datasets.load_dataset_builder(name, task_name, revision=revision)
    if datasets.config.HF_HUB_OFFLINE and revision and builder.hash != revision:
        raise InputError(
            f"--dataset_name {name}: the commit {revision} is not cached, but {builder.hash} is: "
            "give that as --dataset_revision, or --prefetch the other"
        )
    return builder


def _read_folder(folder: Path, name: str, task_name: str | None) -> dict[str, RawSplit]:
    """The splits in a folder; `name` is what the user called it."""
    try:
        if (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(folder), keep_in_memory=False)
            return _splits_of(saved, name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset_name {name} cannot be read: {first_line(error)}") from error
    found = split_files(folder, task_name)
    read = {split: files for split, files in found.items() if split in SPLITS}
    if not read:
        names = [*found] or sorted(path.name for path in folder.iterdir())
        raise InputError(
            f"--dataset_name {name} has no train.parquet, train.csv, train.jsonl or the like, in "
            f"it or in a folder {task_name} (found: {', '.join(names[:8]) or 'nothing'}), and is "
            "no saved DatasetDict"
        )
    return {
        split: _read_files(list(map(str, files)), f"{name}, split {split}")
        for split, files in read.items()
    }


def _splits_of(splits: Mapping[str, Dataset], name: str) -> dict[str, RawSplit]:
    return {
        split: RawSplit(_named_by_content(rows), Place(f"{name}, split {split}"))
        for split, rows in splits.items()
    }


def _named_by_content(rows: Dataset) -> Dataset:
    """The same rows with a fingerprint of their bytes.

    That of `datasets` is one of how they were made: of a function, but not of a file that it read.
    """
    name = content_hash(*(Path(file["filename"]) for file in rows.cache_files))
    return Dataset(rows.data, info=rows.info, split=rows.split, fingerprint=name)


def _read_files(paths: Sequence[str], name: str | None = None) -> RawSplit:
    """The rows of files, one after another; `name` is that of the split, if not those of the files.

    Raises:
        InputError: a file cannot be read, or its columns have other types than those before.
    """
    parts = [read_file(Path(path)) for path in paths]
    place = Place(name or ", ".join(paths), tuple(zip(paths, map(len, parts), strict=True)))
    if len(parts) == 1:
        return RawSplit(parts[0], place)
    tables = [part.data.table for part in parts]
    try:
        # Whole numbers in one file, and decimals in the next.
        table = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{place}: a column must hold values of one kind in all files: {first_line(error)}"
        ) from error
    fingerprint = hashlib.sha256(" ".join(part._fingerprint for part in parts).encode())
    return RawSplit(Dataset(table, fingerprint=fingerprint.hexdigest()), place)


def read_file(path: Path) -> Dataset:
    """The rows of a file, converted once for each content of the file, wherever it lies.

    Raises:
        InputError: the contents are not what the file's name says.
    """
    ending, compression = format_of(path)
    kind = f"{ending[1:]}-{compression}" if compression else ending[1:]
    try:
        name = f"{content_hash(path)}-{kind}-v{READER_VERSION}"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not arrow_file(name).exists():
        write_arrow(arrow_file(name), read_tables(path))
    return cached_rows(name)
