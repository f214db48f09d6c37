"""Small files of rows in each format."""

import json

import datasets
from conftest import write_csv

from lib.data.splits import load_splits

ROWS = [
    {"sentence1": "a b", "sentence2": "c, d", "label": 1},
    {"sentence1": 'say "e"', "sentence2": "NA", "label": 0},
    {"sentence1": "null", "sentence2": "ü\nx", "label": 1},
]


def load(train, validation=None, **changes):
    files = {"train": str(train), "validation": str(validation or train)}
    files |= {"test": str(changes.pop("test"))} if "test" in changes else {}
    return load_splits(files, **{"task_name": None, **changes})


def write(folder, ending, rows):
    path = folder / f"rows.{ending}"
    if ending == "csv":
        write_csv(path, rows)
    elif ending == "tsv":
        lines = ["\t".join(rows[0])] + ["\t".join(str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "json":
        path.write_text(json.dumps({"data": rows}))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path
