"""A picture of a comparison: one dot for each run, and the interval of each set's mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.compare.significance import LEVEL
from lib.errors import InputError

FORMATS = (".png", ".svg", ".pdf")

# Inches. In each row the dots are spread over half of its height, so that equal scores show.
WIDTH, ROW_HEIGHT, MARGIN = 6.4, 0.42, 1.0
SPREAD = 0.5


def check_plot(path: Path) -> None:
    """Check where a picture is to be written, before runs are read.

    Raises:
        InputError: another kind of file is asked for, the folder is not there, or the file is.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--plot {path}: give a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}")
    if path.exists():
        raise InputError(f"--plot {path} exists already: give another name, or remove it")


def save_plot(content: Mapping[str, Any], path: Path) -> None:
    """Draw the metric that decides: a row for each set, set A's interval as a band over all rows.

    Args:
        content: what `compare_runs` returns.
    """
    from matplotlib.figure import Figure

    sets, name = content["sets"], f"eval_{content['deciding_metric']}"
    figure = Figure((WIDTH, MARGIN + ROW_HEIGHT * len(sets)), layout="constrained")
    axes = figure.subplots()
    band = sets["A"]["figures"][name]["interval"]
    if band:
        axes.axvspan(*(100 * end for end in band), color="#0072B2", alpha=0.12, linewidth=0)
    for row, one in enumerate(sets.values()):
        found = one["figures"][name]
        values = [100 * value for value in found["values"]]
        heights = [
            row + SPREAD * ((number + 0.5) / len(values) - 0.5) for number in range(len(values))
        ]
        axes.plot(values, heights, "o", color="#0072B2", alpha=0.5, markersize=3.5)
        mean = 100 * found["mean"]
        ends = [100 * end for end in found["interval"] or (found["mean"], found["mean"])]
        axes.errorbar(
            mean,
            row,
            xerr=[[mean - ends[0]], [ends[1] - mean]],
            fmt="D",
            color="#D55E00",
            capsize=4,
        )
    axes.set_yticks(range(len(sets)), [f"{label}: {one['name']}" for label, one in sets.items()])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"validation {sets['A']['figures'][name]['title'].removeprefix('eval_')}, %, of each run; "
        f"mean and its {1 - LEVEL:.0%} interval"
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
