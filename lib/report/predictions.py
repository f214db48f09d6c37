"""The files under predictions/. Imports nothing heavy, as a finished run is read with it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.checkpoints.atomic import replacing, write_text
from lib.training.metrics import has_labels, predictions_of, probabilities_of

FOLDER = "predictions"


def write_predictions(
    path: Path, logits: NDArray[Any], labels: NDArray[Any], names: Sequence[str]
) -> None:
    """Write a JSON line per row: index, prediction, class probabilities, and label if known.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression, whose prediction is the score.
        names: of the classes; empty for a regression.
    """
    predictions = predictions_of(logits)
    probabilities = probabilities_of(logits) if names else None
    labeled = has_labels(labels)

    def lines() -> Iterator[str]:
        for row, prediction in enumerate(predictions):
            line: dict[str, Any] = {"index": row}
            if probabilities is None:
                line["prediction"] = float(prediction)
            else:
                line["prediction"] = names[prediction]
                line["probabilities"] = dict(zip(names, probabilities[row].tolist(), strict=True))
            if labeled:
                line["label"] = names[int(labels[row])] if names else float(labels[row])
            yield json.dumps(line, ensure_ascii=False) + "\n"

    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(lines())


def read_predictions(path: Path, names: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read what `write_predictions` wrote of a split with labels.

    Returns:
        (rows, classes) probabilities and (rows,) class numbers; for a regression, whose `names`
        are empty, (rows,) predicted scores and (rows,) labels.
    """
    numbers = {name: number for number, name in enumerate(names)}

    def values() -> Iterator[list[float]]:
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                if names:
                    probabilities = line["probabilities"]
                    yield [*(probabilities[name] for name in names), numbers[line["label"]]]
                else:
                    yield [line["prediction"], line["label"]]

    # Streamed: as Python objects, a million lines would take a gigabyte.
    width = len(names) + 1 if names else 2
    table = np.fromiter(values(), dtype=np.dtype((np.float64, width)))
    if names:
        return table[:, :-1], table[:, -1].astype(int)
    return table[:, 0], table[:, 1]


def write_submission(
    path: Path, predictions: NDArray[Any], names: Sequence[str], *, submits_names: bool
) -> None:
    """Write the file that gluebenchmark.com takes: `index<TAB>prediction`, in row order.

    Args:
        predictions: (rows,) class numbers, or scores for a regression.
        names: of the classes; empty for a regression.
    """
    if not names:
        values = [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]  # STS-B's range
    elif submits_names:
        values = [names[number] for number in predictions]
    else:
        values = [str(number) for number in predictions]
    rows = (f"{index}\t{value}\n" for index, value in enumerate(values))
    write_text(path, "index\tprediction\n" + "".join(rows))
