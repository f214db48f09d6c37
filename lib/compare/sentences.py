"""Sentences about a comparison: what its figures mean, and what they do not."""

from collections.abc import Iterator, Mapping
from typing import Any

from lib.compare.significance import LEVEL, MIN_RUNS, POWER


def sentences(content: Mapping[str, Any]) -> Iterator[str]:
    """Say what the figures mean, and what they do not."""
    sets = content["sets"]
    for label, one in sets.items():
        if len(one["runs"]) == 1:
            yield f"{label} is a single run: one seed has no interval."
        for run, name in one["collapsed"].items():
            yield (
                f"{run} ({label}) collapsed: it predicts every row as {name!r}. The figures "
                "include it, because a recipe that collapses does so with other seeds too."
            )
        if one["recipes_differ_in"]:
            yield (
                f"The runs of {label} are not of one recipe (they differ in "
                f"{', '.join(one['recipes_differ_in'])}): their spread is not that of seeds."
            )
    differences = content.get("differences", {})
    for label, difference in differences.items():
        metric = difference["metrics"][content["deciding_metric"]]
        yield from _difference_sentences(label, difference, metric, sets, len(differences))
    first = sets["A"]
    if first["cut_from_training_rows"]:
        yield (
            "The runs validate on different rows, cut from their training rows. As those overlap, "
            "the intervals allow for more variance than between independent runs (Nadeau and "
            "Bengio, 2003)."
        )
    if first["standard_error_of_rows"] is not None:
        yield (
            f"With {first['num_rows']} validation rows the accuracy of each model has a standard "
            f"error of {points(first['standard_error_of_rows'])} points, which more seeds do not "
            f"reduce: sqrt(p (1 - p) / n) with p = {first['accuracy']:.3f}."
        )


def _difference_sentences(
    label: str,
    difference: Mapping[str, Any],
    metric: Mapping[str, Any],
    sets: Mapping[str, Any],
    num_comparisons: int,
) -> Iterator[str]:
    """Say whether set A and the set with this label differ, and in which flags."""
    a, other = sets["A"], sets[label]
    title, (low, high) = metric["title"], metric["interval"]
    interval = (
        f"{title}: A - {label} is {points(metric['difference'], sign=True)} points, with a 95% "
        f"interval from {points(low, sign=True)} to {points(high, sign=True)}"
    )
    own_rows = a["cut_from_training_rows"]
    if metric["distinguishable"] is not None:
        over = "pairs of runs on the same rows" if own_rows else "seeds and rows"
        p_value, corrected = difference["adjusted_p_value"], ""
        if num_comparisons > 1:
            corrected = f", corrected for {num_comparisons} comparisons (Holm)"
        verdict = "not distinguishable from noise"
        if p_value < LEVEL:
            verdict = f"{'A' if metric['difference'] > 0 else label} is higher by more than noise"
        yield (
            f"{interval} over {over}: {verdict} (p = {p_value:.2g}{corrected}). "
            f"{POWER:.0%} of such comparisons would find a difference of "
            f"{points(metric['detectable'])} points."
        )
    else:
        covered = "" if own_rows else ", which covers other rows but not other seeds"
        yield (
            f"{interval}{covered}. Too few runs to tell "
            f"whether the recipes differ: it takes at least {MIN_RUNS} of each, here are "
            f"{len(a['runs'])} and {len(other['runs'])}."
        )
    num_pairs = difference["num_pairs"]
    if 0 < num_pairs < max(len(a["runs"]), len(other["runs"])):
        yield f"A - {label} is of the {num_pairs} seeds that both sets have, in pairs."
    changed = [
        f"{field} {one} and {another}"
        for field, (one, another) in difference["recipes_differ_in"].items()
    ]
    flags = f"in: {', '.join(changed)}" if changed else "in no flag but the seed"
    yield f"The first runs of A and {label} differ {flags}."


def points(share: float, *, sign: bool = False) -> str:
    """Format a share of 1 as percentage points."""
    return f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
