"""Validation rows that are cut from the training rows, as a function of the rows and a seed."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow
from datasets import Dataset
from numpy.typing import NDArray

from lib.data.files.cache import arrow_file, cached_rows, write_arrow
from lib.data.rows.hashes import text_hashes
from lib.errors import InputError

# Scores are stratified by tenths of the rows.
NUM_SCORE_STRATA = 10


@dataclasses.dataclass(frozen=True)
class Holdout:
    """Which rows are held out for validation: a share, or one of several folds.

    Attributes:
        seed: decides, with the rows, which ones.
        share: of the rows, if there are no folds.
        folds: number of parts, each of which validates once.
        fold: the part that validates, counted from 0.
    """

    seed: int
    share: float | None = None
    folds: int | None = None
    fold: int | None = None

    def __str__(self) -> str:
        if self.share is not None:
            return f"--validation_share {self.share:g}"
        return f"--folds {self.folds} --fold {self.fold}"


def held_out(
    labels: NDArray[np.int64] | NDArray[np.float64],
    hashes: NDArray[np.uint64],
    holdout: Holdout,
) -> NDArray[np.bool_]:
    """Return which rows are held out for validation.

    Groups of rows of equal texts stay together. They are shuffled, sorted by class and size, and
    dealt out in turn, so that each part has its share of every class, to one group of each size.

    Args:
        labels: (rows,) numbers of classes, or scores.
        hashes: (rows,) equal for rows of equal texts.
    """
    strata = labels
    if labels.dtype == np.float64:
        ranks = np.argsort(np.argsort(labels, kind="stable"))
        strata = ranks * NUM_SCORE_STRATA // len(labels)
    _, first, group, sizes = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    # In the order of their first rows, so that the values of the hashes do not matter.
    shuffled = np.random.default_rng(holdout.seed).permutation(np.argsort(first))
    dealt = shuffled[np.lexsort((sizes[shuffled], strata[first[shuffled]]))]
    if holdout.folds is not None:
        return np.isin(group, dealt[holdout.fold :: holdout.folds])
    assert holdout.share is not None
    # A group is taken where the number to take, rounded, rises.
    to_take = np.floor(np.arange(len(dealt) + 1) * holdout.share + 0.5)
    return np.isin(group, dealt[np.diff(to_take) > 0])


def cut(rows: Dataset, where: str, holdout: Holdout) -> tuple[Dataset, Dataset, NDArray[np.int64]]:
    """Return the training rows, the validation rows, and the positions of the latter in `rows`.

    Both keep the order of `rows`, and are cached as files mapped into memory.

    Args:
        rows: checked.
        where: names them in an error.

    Raises:
        InputError: there are too few rows.
    """
    labels = rows.data.column("labels").to_numpy()
    mask = held_out(labels, text_hashes(rows), holdout)
    if mask.all() or not mask.any():
        part = "training" if mask.all() else "validation"
        raise InputError(f"{holdout} of the {len(rows):,} rows of {where} leaves no {part} rows")
    parts = []
    for part, wanted in (("train", ~mask), ("validation", mask)):
        content = hashlib.sha256(rows._fingerprint.encode() + wanted.tobytes()).hexdigest()[:32]
        name = f"{content}-{part}"
        if not arrow_file(name).exists():
            write_arrow(arrow_file(name), _filtered(rows, wanted))
        parts.append(cached_rows(name))
    return parts[0], parts[1], np.flatnonzero(mask)


def _filtered(rows: Dataset, wanted: NDArray[np.bool_]) -> Iterator[pyarrow.Table]:
    start = 0
    for batch in rows.data.table.to_batches():
        chosen = batch.filter(pyarrow.array(wanted[start : start + len(batch)]))
        yield pyarrow.Table.from_batches([chosen])
        start += len(batch)
