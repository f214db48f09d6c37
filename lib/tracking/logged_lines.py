"""The lines of metrics.jsonl as trackers name them, and those that earlier starts logged."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STEP = "train/global_step"
EVALUATED = "eval/global_step"

# Identifies a line: an update may have one of training and one of an evaluation.
Line = tuple[str, int]


def named(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl under the names that trackers group by."""
    values: dict[str, Any] = {STEP: line["update"]}
    if "eval_loss" in line:
        values[EVALUATED] = line["update"]
    for name, value in line.items():
        if name != "update" and value is not None:
            kind, _, rest = name.partition("_")
            values[f"eval/{rest}" if kind == "eval" else f"train/{name}"] = value
    return values


def _is_line(values: Mapping[str, Any]) -> bool:
    """True for a line of metrics.jsonl, false for a chart and for what wandb adds itself."""
    return STEP in values and ("train/loss" in values or EVALUATED in values)


def key_of(values: Mapping[str, Any]) -> Line:
    """Identify a line by its `named` values."""
    return "eval" if EVALUATED in values else "train", int(values[STEP])


def wandb_lines(files: Iterable[Path]) -> set[Line]:
    """Return what earlier starts of this run wrote to wandb's files.

    A killed process loses the end of what it logged, so metrics.jsonl cannot tell.
    """
    held: set[Line] = set()
    for path in files:
        if path.stat().st_size == 0:
            continue  # killed at once
        # Prints what it can read, and may fail at the end that a killed process left unfinished.
        printed = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        for line in printed.splitlines():
            record = json.loads(line)
            if record["type"] == "history" and _is_line(record["history"]["item"]):
                held.add(key_of(record["history"]["item"]))
    return held


def trackio_lines(project: str, name: str) -> set[Line]:
    """Return what earlier starts of this run wrote to trackio's folder.

    Raises:
        OSError: trackio could not read it.
    """
    held: set[Line] = set()
    for kind in ("train", "eval"):
        done = subprocess.run(
            [sys.executable, "-m", "trackio.cli", "get", "metric", "--json",
             "--project", project, "--run", name, "--metric", f"{kind}/loss"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )  # fmt: skip
        if done.returncode == 0:
            held |= {(kind, value["step"]) for value in json.loads(done.stdout)["values"]}
        elif "not found" not in done.stderr:  # as it is if it was killed before the first
            raise OSError(done.stderr)
    return held
