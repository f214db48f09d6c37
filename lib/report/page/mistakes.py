"""The rows that the model gets most wrong, with the words in which two texts differ."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_SHOWN = 20
# Of a word on average, so that a text without spaces is cut too.
MOST_CHARACTERS = 12

# The share of the words of two texts that stand in both, in the same order. Below it marks would
# cover most words and point at nothing: 6.5% of MRPC's 3,668 training pairs are below, and 99.9% of
# the same sentences paired at random.
LEAST_SIMILARITY = 0.4

Piece = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A row of the page. `detail` is a probability or, for a regression, the signed error.

    `texts` are pieces of each text with whether to mark them; `differ` says that nothing is
    marked, because the texts have too little in common.
    """

    row: int
    prediction: str
    detail: str
    label: str
    texts: list[list[Piece]]
    differ: bool


def worst_rows(predicted: Array, labels: Array, count: int = NUM_SHOWN) -> list[int]:
    """The rows to show, worst first: confident mistakes, or the largest errors of a regression.

    Args:
        predicted, labels: as `read_predictions` returns them.
    """
    if predicted.ndim == 1:
        rows = np.arange(len(labels))
        errors = np.abs(predicted - labels)
    else:
        rows = np.flatnonzero(predicted.argmax(axis=1) != labels)
        errors = predicted[rows].max(axis=1)
    order = np.argsort(-errors, kind="stable")
    return [int(row) for row in rows[order][:count]]


def mistakes(
    predicted: Array, labels: Array, texts: Mapping[int, Sequence[str]], names: Sequence[str]
) -> list[Mistake]:
    """The rows of `texts` for the page.

    Args:
        predicted, labels: as `read_predictions` returns them.
        texts: the text columns of each row to show, worst first.
        names: of the classes; empty for a regression.
    """
    found = []
    for row, columns in texts.items():
        if names:
            number = int(predicted[row].argmax())
            words = (names[number], f"{predicted[row, number]:.1%}", names[labels[row]])
        else:
            error = predicted[row] - labels[row]
            words = (f"{predicted[row]:.2f}", f"{error:+.2f}", f"{labels[row]:.2f}")
        marked = mark_differences(columns)
        found.append(
            Mistake(row, *words, marked or [[(text, False)] for text in columns], marked is None)
        )
    return found


def mark_differences(texts: Sequence[str]) -> list[list[Piece]] | None:
    """Split one or two texts into pieces, each with whether the other text lacks it.

    Compares words and punctuation marks as they are written.

    Returns:
        None for two texts that are too different for marks to point at anything.
    """
    if len(texts) == 1:
        return [[(texts[0], False)]]
    words = [_words(text) for text in texts]
    first, second = ([word.strip() for word in text] for text in words)
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    if matcher.ratio() < LEAST_SIMILARITY:
        return None
    marked: list[list[Piece]] = [[], []]
    for kind, *ends in matcher.get_opcodes():
        for side in (0, 1):
            piece = "".join(words[side][ends[2 * side] : ends[2 * side + 1]])
            text = piece.lstrip()
            marked[side] += [(piece[: len(piece) - len(text)], False), (text, kind != "equal")]
    return [[part for part in side if part[0]] for side in marked]


def shorten(text: str, max_words: int) -> str:
    """The first words of a text: what the model does not read explains no mistake."""
    words = _words(text[: MOST_CHARACTERS * max_words])
    shown = "".join(words[:max_words])
    return shown if shown == text.strip() else f"{shown} …"


def _words(text: str) -> list[str]:
    """Words and punctuation marks, each with the white space before it."""
    return re.findall(r"\s*(?:\w+|[^\w\s])", text.strip())
