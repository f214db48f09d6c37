"""Reads what trackers wrote, with their own tools."""

import json
import subprocess
import sys

from lib.tracking.logged_lines import EVALUATED, STEP


def inspect(folder):
    """Return all records of the offline segments of a run, in the order of their starts."""
    records = []
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        file = next(path.glob("*.wandb"), None)
        if file is None:
            continue  # killed as it began
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def history(records):
    """Return the rows that hold lines of metrics.jsonl."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if "train/loss" in row or "eval/loss" in row]


def as_lines(rows):
    """Return rows under the names of metrics.jsonl, without wandb's own values."""
    lines = []
    for row in rows:
        line = {"update": row[STEP]}
        for name, value in row.items():
            if name.startswith("train/") and name != STEP:
                line[name.removeprefix("train/")] = value
            elif name.startswith("eval/") and name != EVALUATED:
                line["eval_" + name.removeprefix("eval/")] = value
        lines.append(line)
    return lines


def config_of(records):
    config = {}
    for record in records:
        if record["type"] in ("run", "config"):
            part = record[record["type"]]
            config |= part.get("config", part).get("update", {})
    return config


def tensorboard_losses(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "train_mrpc"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]
