"""A run whose main process tokenizes slowly; prints who tokenizes, and who maps deleted files."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_mrpc
from lib.cli.parsing import parse_arguments
from lib.data import splits

RANK = os.environ["RANK"]
encode_rows, make_optimizer = splits.encode_rows, train_mrpc.make_optimizer


def encode_slowly(*arguments, **options):
    print(f"rank {RANK} tokenizes", flush=True)
    time.sleep(3 if RANK == "0" else 0)
    return encode_rows(*arguments, **options)


def look_at_maps(*arguments):
    """Called when all have loaded their rows."""
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
    deleted = sum(line.endswith("(deleted)") for line in mapped)
    print(f"rank {RANK} maps {len(mapped)} files, {deleted} of them deleted", flush=True)
    return make_optimizer(*arguments)


splits.encode_rows, train_mrpc.make_optimizer = encode_slowly, look_at_maps
train_mrpc.results.write_report = lambda *_: None  # takes longer than the training
train_mrpc.main(parse_arguments(sys.argv[1:]))
