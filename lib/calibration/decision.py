"""From logits to predictions, with the threshold and the temperature that a user asks for."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lib.calibration.cross_fitting import CONFIG_FILE, CONFIG_KEY
from lib.calibration.temperature import scaled
from lib.calibration.threshold import decide
from lib.errors import InputError
from lib.training.metrics import predictions_of, probabilities_of

Array = NDArray[Any]

FITTED = "fitted"


@dataclasses.dataclass(frozen=True)
class Decision:
    """How logits become predictions; None means the most likely class, and no temperature.

    The threshold is one of the probability that is written, after the temperature.
    """

    threshold: float | None = None
    temperature: float | None = None

    def scaled(self, logits: Array) -> Array:
        """Logits divided by the temperature."""
        return logits if self.temperature is None else scaled(logits, self.temperature)

    def decide(self, logits: Array) -> tuple[Array, Array | None]:
        """(rows,) classes and (rows, classes) probabilities; for a regression, scores and None."""
        if logits.shape[1] == 1:
            return predictions_of(logits), None
        probabilities = probabilities_of(self.scaled(logits))
        if self.threshold is None:
            return predictions_of(logits), probabilities
        return decide(probabilities[:, 1], self.threshold), probabilities


def read_decision(
    folder: Path, num_classes: int, threshold: str | None, temperature: str | None
) -> Decision:
    """The decision that `--threshold` and `--temperature` ask for: a number each, or `fitted`.

    Raises:
        InputError: they are neither, do not go with the task, or none was fitted.
    """
    if threshold is not None and num_classes != 2:
        raise InputError(f"--threshold decides between two classes; {folder} has {num_classes}")
    if temperature is not None and num_classes < 2:
        raise InputError(f"--temperature scales probabilities; {folder} predicts scores")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    fitted = config.get(CONFIG_KEY, {})
    cut = _value("threshold", threshold, fitted, below=1.0)
    divisor = _value("temperature", temperature, fitted, below=math.inf)
    if threshold == FITTED and cut is not None and divisor is not None:
        # Fitted to plain probabilities: the same decisions on scaled ones.
        cut = float(1 / (1 + (1 / cut - 1) ** (1 / divisor)))
    return Decision(cut, divisor)


def _value(name: str, given: str | None, fitted: dict[str, float], *, below: float) -> float | None:
    if given is None:
        return None
    if given == FITTED:
        if name not in fitted:
            raise InputError(
                f"--{name} {FITTED}: {CONFIG_FILE} holds none, as the run had too few validation "
                "rows or is older than this option; give a number"
            )
        return float(fitted[name])
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < below:
        limits = "between 0 and 1" if below == 1 else "above 0"
        raise InputError(f"--{name} must be {FITTED} or a number {limits}, got {given!r}")
    return value
