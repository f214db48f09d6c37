"""Tokenize the texts of rows: the function for `Dataset.map`, and what names its cache."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase


def encode_rows(
    batch: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    max_length: int,
) -> dict[str, Any]:
    """Tokenize a batch for `Dataset.map`, and keep each row's number as `row`.

    Rows are padded later, when they are batched.
    """
    texts = [batch[name] for name in columns]
    return {"row": rows, **tokenizer(*texts, truncation=True, max_length=max_length)}


def tokenizer_key(tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> str:
    """A hash of all that decides what `encode_rows` makes of a text."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    settings = (type(tokenizer).__name__, str(tokenizer.init_kwargs), max_length)
    content = json.dumps([vocabulary, settings], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def row_lengths(rows: Dataset) -> NDArray[np.int32]:
    """Tokens of each tokenized row."""
    lengths = pc.list_value_length(rows.data.column("input_ids"))
    return lengths.to_numpy().astype(np.int32, copy=False)


def model_columns(rows: Dataset) -> list[str]:
    """The columns of tokenized rows that the model takes."""
    return [name for name in rows.column_names if name not in ("labels", "row")]
