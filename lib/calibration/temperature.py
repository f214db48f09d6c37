"""The temperature that logits are divided by, so that probabilities say how often they are right.

Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.training.metrics import probabilities_of

Array = NDArray[Any]

# The likelihood of rows without a mistake has no maximum.
LOWEST, HIGHEST = 0.1, 10.0
TOLERANCE = 1e-10


def scaled(logits: Array, temperature: float | Array) -> Array:
    """(rows, classes) logits in float64, divided by the temperature, or by that of each row."""
    return np.asarray(logits.astype(np.float64) / np.reshape(temperature, (-1, 1)))


def fit_temperature(logits: Array, labels: Array) -> float:
    """The temperature from `LOWEST` to `HIGHEST` with the least mean cross-entropy.

    Which is convex in the inverse temperature: Newton's method, bisecting where a step would
    leave the bracket. SciPy's, whose import takes longer than all fits of a run, agrees.

    Args:
        logits: (rows, classes).
        labels: (rows,) class numbers.
    """
    logits = logits.astype(np.float64)
    of_labels = logits[np.arange(len(labels)), labels.astype(int)].mean()
    low, high, inverse = 1 / HIGHEST, 1 / LOWEST, 1.0
    while high - low > TOLERANCE:
        probabilities = probabilities_of(logits * inverse)
        means = (probabilities * logits).sum(axis=1)
        slope = means.mean() - of_labels
        curvature = ((probabilities * logits**2).sum(axis=1) - means**2).mean()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = slope / curvature if curvature > 0 else np.inf
        following = inverse - step
        if abs(step) < TOLERANCE:
            break
        inverse = following if low < following < high else (low + high) / 2
    return float(1 / inverse)
