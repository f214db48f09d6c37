"""Read a data set of the hub, a folder or files into Arrow files that are mapped into memory.

CSV and JSON go through Python's parsers, a batch of rows at a time and once for each content. Those
of Arrow are twice as fast, but drop a stray quote in silence, turn text that looks like a date into
one, and name no line.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.packaged_modules.cache.cache import Cache
from datasets.table import MemoryMappedTable

from lib.errors import InputError
from lib.hub.client import reason_of
from lib.hub.download import download_dataset_files
from lib.hub.reach import REMEDY

ROWS_PER_BATCH = 65_536
# Part of the names of cached files: raise it when the readers give other rows for the same bytes.
READER_VERSION = 1


def read_splits(
    source: str | Mapping[str, str], task_name: str | None, *, revision: str | None = None
) -> dict[str, Dataset]:
    """The raw rows of each split.

    Args:
        source: a data set of the hub, a local folder, `demo`, or the path of each split's file.
        task_name: the configuration of a data set of the hub.

    Raises:
        InputError: it does not exist, cannot be read, or is not what its name says.
    """
    if not isinstance(source, str):
        return {split: read_file(Path(path)) for split, path in source.items()}
    folder = Path(source)
    if source == "demo":
        from lib.demo.corpus import corpus_folder, write_corpus

        folder = write_corpus(corpus_folder())
    if folder.is_dir():
        return _read_folder(folder)
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
        # Without a hub `datasets` raises ConnectionError, FileNotFoundError or ValueError,
        # depending on what is cached and on HF_HUB_OFFLINE; RuntimeError for a script.
        raise InputError(
            f"--dataset_name {source} ({task_name}) is neither cached nor available from the hub: "
            f"{reason_of(error)}; {REMEDY}"
        ) from error
    return {name: _named_by_content(rows) for name, rows in splits.items()}


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


def _read_folder(folder: Path) -> dict[str, Dataset]:
    try:
        if (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(folder), keep_in_memory=False)
            return {name: _named_by_content(rows) for name, rows in saved.items()}
        # train.parquet, or the hub's train-00000-of-00002.parquet
        shards: dict[str, list[Dataset]] = {}
        for path in sorted(folder.glob("*.parquet")):
            shards.setdefault(path.stem.split("-")[0], []).append(read_file(path))
        if not shards:
            raise InputError(
                f"--dataset_name {folder}: holds no Parquet file (train.parquet, "
                "validation.parquet, ...) and no saved DatasetDict"
            )
        return {name: datasets.concatenate_datasets(parts) for name, parts in shards.items()}
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset_name {folder} cannot be read: {_first_line(error)}") from error


def _named_by_content(rows: Dataset) -> Dataset:
    """The same rows with a fingerprint of their bytes.

    That of `datasets` is one of how they were made: of a function, but not of a file that it read.
    """
    name = _content_hash(*(Path(file["filename"]) for file in rows.cache_files))
    return Dataset(rows.data, info=rows.info, split=rows.split, fingerprint=name)


# ------------------------------------------------------------------------------------- files


def read_file(path: Path) -> Dataset:
    """The rows of a CSV, TSV, JSON Lines, JSON or Parquet file; CSV and TSV values are text.

    TSV is read as GLUE writes it, without quoting. The rows are converted once for each content
    of the file, wherever it lies.

    Raises:
        InputError: the contents are not what the file's name says.
    """
    ending = path.suffix.lower()
    name = f"{_content_hash(path)}-{ending[1:]}-v{READER_VERSION}"
    cached = cache_folder() / "rows" / f"{name}.arrow"
    if not cached.exists():
        try:
            _write_arrow(cached, _READERS[ending](path))
        except UnicodeDecodeError as error:
            raise _invalid_utf8(path) from error
        except (pyarrow.ArrowException, csv.Error, json.JSONDecodeError, OverflowError) as error:
            raise InputError(
                f"{path} is not the {ending[1:].upper()} its name says: {_first_line(error)}"
            ) from error
    return Dataset(MemoryMappedTable.from_file(str(cached)), fingerprint=name)


def cache_folder() -> Path:
    """Where converted and tokenized rows are kept between runs."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "train_mrpc"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; move the file to `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        new = Path(scratch) / path.name
        yield new
        os.replace(new, path)


def _write_arrow(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    remaining = iter(tables)
    first = next(remaining)
    with written_whole(path) as new, pyarrow.ipc.new_stream(str(new), first.schema) as writer:
        for table in itertools.chain([first], remaining):
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)


def _content_hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _read_csv(path: Path) -> Iterator[pyarrow.Table]:
    return _read_delimited(path, strict=True)


def _read_tsv(path: Path) -> Iterator[pyarrow.Table]:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, **dialect: Any) -> Iterator[pyarrow.Table]:
    # newline="" leaves line ends inside quotes to the csv module; utf-8-sig drops Excel's mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path} has two columns of one name: {', '.join(header)}")
        schema = pyarrow.schema([(name, pyarrow.string()) for name in header])
        yield schema.empty_table()
        rows = _complete_rows(path, header, reader)
        while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
            yield pyarrow.Table.from_arrays(
                [pyarrow.array(values, pyarrow.string()) for values in zip(*batch, strict=True)],
                schema=schema,
            )


def _complete_rows(
    path: Path, header: list[str], reader: Iterable[list[str]]
) -> Iterator[list[str]]:
    filled = (values for values in reader if values)  # skips blank lines
    for number, values in enumerate(filled, start=1):
        if len(values) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(values)} values where the header has {len(header)} "
                f"({', '.join(header)})"
            )
        yield values


def _read_json_lines(path: Path) -> Iterator[pyarrow.Table]:
    with path.open(encoding="utf-8-sig") as file:
        yield _table_of_objects(path, _objects_of_lines(path, file))


def _objects_of_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {line.strip()}")
        yield row


def _read_json(path: Path) -> Iterator[pyarrow.Table]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            raise InputError(f"{path} holds several JSON values: name it .jsonl") from error
        raise
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path}: expected a list of objects, one for each row")
    yield _table_of_objects(path, content)


def _table_of_objects(path: Path, objects: Iterable[dict[str, Any]]) -> pyarrow.Table:
    """Columns of one type each; a value that a row lacks is null, and so is NaN.

    Raises:
        InputError: text and numbers, say, in one column.
    """
    rows = iter(objects)
    tables, num_rows = [pyarrow.table({})], 0
    first: dict[str, Any] = {}  # of each column, the first value that is there
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        columns = {}
        for name in dict.fromkeys(name for row in batch for name in row):
            values = [_null_for_nan(row.get(name)) for row in batch]
            for number, value in enumerate(values, start=num_rows + 1):
                if value is not None and not _same_kind(value, first.setdefault(name, value)):
                    raise InputError(
                        f"{path}, row {number}: {name} is {value!r}, and in the rows before "
                        f"{first[name]!r}: a column holds values of one kind"
                    )
            columns[name] = values
        tables.append(pyarrow.table(columns))
        num_rows += len(batch)
    # The types of the batches may differ: whole numbers in one, and decimals in the next.
    return pyarrow.concat_tables(tables, promote_options="permissive")


def _null_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _same_kind(value: Any, first: Any) -> bool:
    return type(value) is type(first) or {type(value), type(first)} == {int, float}


def _read_parquet(path: Path) -> Iterator[pyarrow.Table]:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        for index, field in enumerate(schema):
            if pyarrow.types.is_string_view(field.type):  # as Polars writes text
                schema = schema.set(index, field.with_type(pyarrow.string()))
        yield schema.empty_table()
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
            yield pyarrow.Table.from_batches([batch]).cast(schema)


_READERS: dict[str, Callable[[Path], Iterator[pyarrow.Table]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _invalid_utf8(path: Path) -> InputError:
    """The error for the first line that is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return InputError(
                    f"{path}, line {number}: invalid UTF-8 (byte {line[error.start]:#04x}); save "
                    "the file as UTF-8"
                )
    raise AssertionError("only called for a file that is no UTF-8")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
