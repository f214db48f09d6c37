"""The cache of converted and tokenized rows, named by content and written whole."""

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset
from datasets.table import MemoryMappedTable


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


def arrow_file(name: str) -> Path:
    """Where the rows of this name are cached."""
    return cache_folder() / "rows" / f"{name}.arrow"


def write_arrow(path: Path, tables: Iterable[pyarrow.Table | pyarrow.RecordBatch]) -> None:
    """Write tables of one schema, at least one, to an Arrow stream."""
    remaining = iter(tables)
    first = next(remaining)
    with written_whole(path) as new, pyarrow.ipc.new_stream(str(new), first.schema) as writer:
        for table in itertools.chain([first], remaining):
            writer.write(table)


def cached_rows(name: str) -> Dataset:
    """The rows that were cached under this name, mapped into memory."""
    return Dataset(MemoryMappedTable.from_file(str(arrow_file(name))), fingerprint=name)


def content_hash(*paths: Path) -> str:
    """SHA-256 of the bytes of files, shortened."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]
