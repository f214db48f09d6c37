"""Hashes of the texts of rows, by which equal rows are found without keeping a text in memory."""

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from pandas.util import hash_pandas_object

from lib.data.files.cache import cache_folder, written_whole

ROWS_PER_BATCH = 65_536


def text_hashes(rows: Dataset) -> NDArray[np.uint64]:
    """The hash of all texts of each checked row; rows are equal if it is equal.

    Cached under the fingerprint of the rows, so that a later start reads no text.
    """
    cached = cache_folder() / "hashes" / f"{rows._fingerprint}.npy"
    if cached.exists():
        return np.load(cached)
    texts = rows.data.table.drop_columns("labels")
    hashes = np.concatenate(
        [
            hash_pandas_object(batch.to_pandas(), index=False, categorize=False).to_numpy()
            for batch in texts.to_batches(ROWS_PER_BATCH)
        ]
    )
    with written_whole(cached) as new:
        np.save(new, hashes)
    return hashes
