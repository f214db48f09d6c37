"""What choosing the rows of an update costs, against the rows, the processes, and the update.

    python -m benchmarks.dealing --rows 4000 40000 400000 4000000 --processes 1 8 64

Plans epochs and deals their rows as the script does, in one process that has the place of rank 0,
without a model, and counts the seconds of the processor. Lengths are log-normal; each process has
16 rows in an update on average.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from matplotlib.figure import Figure

from benchmarks.batches import log_normal
from lib.data.batching import Integers, MicroBatches, plan_epoch

ROWS_PER_PROCESS = 16
RESUMED_AT = 100_000  # the update
REPEATS = 5


def sampler_of(lengths: Integers, num_processes: int) -> MicroBatches:
    rows = ROWS_PER_PROCESS * num_processes
    plan = partial(plan_epoch, lengths, seed=42, batch_size=rows, num_micro_batches=num_processes)
    return MicroBatches(plan, -(-len(lengths) // rows), num_processes)


def deal(sampler: MicroBatches, num_processes: int, first: int, num_updates: int) -> list[float]:
    """Deal updates from number `first` on; return the processor-seconds of each."""
    loader = BatchSamplerShard(sampler, num_processes, 0, even_batches=False)
    seconds = []
    updates = sampler.updates(loader, num_processes, first, first + num_updates)
    for _ in range(num_updates):
        started = time.process_time()
        _, micro_batches = next(updates)
        (_,) = micro_batches
        seconds.append(time.process_time() - started)
    updates.close()
    return seconds


def measure(lengths: Integers, num_processes: int, num_updates: int) -> dict[str, float]:
    """Processor-seconds: medians over repeats and updates.

    Returns:
        plan: of one epoch.
        update: dealing one update.
        first: from a fresh sampler to the rows of the first update.
        resumed: the same, where that update is number `RESUMED_AT`.
    """
    times: dict[str, list[float]] = {"plan": [], "update": [], "first": [], "resumed": []}
    for _ in range(REPEATS):
        for name, update in (("first", 0), ("resumed", RESUMED_AT)):
            started = time.process_time()
            deal(sampler_of(lengths, num_processes), num_processes, update, 1)
            times[name].append(time.process_time() - started)
        sampler = sampler_of(lengths, num_processes)
        started = time.process_time()
        sampler.plan(0)
        times["plan"].append(time.process_time() - started)
        times["update"] += deal(sampler, num_processes, 0, min(num_updates, sampler.per_epoch))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(results: dict[tuple[int, int], dict[str, float]]) -> str:
    """The measurements in Markdown, a line for each number of rows and of processes."""
    lines = [
        "| rows | processes | planning an epoch, ms | the same for an update, ms "
        f"| dealing an update, ms | start at update 0, ms | start at update {RESUMED_AT:,}, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for (num_rows, num_processes), found in results.items():
        per_epoch = -(-num_rows // (ROWS_PER_PROCESS * num_processes))
        lines.append(
            f"| {num_rows:,} | {num_processes} | {1e3 * found['plan']:.1f} "
            f"| {1e3 * found['plan'] / per_epoch:.3f} | {1e3 * found['update']:.3f} "
            f"| {1e3 * found['first']:.1f} | {1e3 * found['resumed']:.1f} |"
        )
    return "\n".join(lines)


def save_plot(results: dict[tuple[int, int], dict[str, float]], path: Path) -> None:
    """Draw an update and a start against the rows, a line for each number of processes."""
    figure = Figure((7.6, 3.4), layout="constrained")
    updates, starts = figure.subplots(1, 2)
    for line, processes in enumerate(dict.fromkeys(number for _, number in results)):
        color = f"C{line}"
        sizes = [rows for rows, number in results if number == processes]
        found = [results[rows, processes] for rows in sizes]
        label = f"{processes} process{'es' * (processes > 1)}"
        updates.plot(sizes, [1e3 * one["update"] for one in found], "o-", color=color, label=label)
        starts.plot(sizes, [one["first"] for one in found], "o-", color=color, label=label)
        starts.plot(sizes, [one["resumed"] for one in found], "x--", color=color)
    updates.set_ylabel("dealing an update, ms")
    starts.set_ylabel("to the first rows, s")
    starts.plot([], [], "x--", color="#999999", label=f"from update {RESUMED_AT:,}")
    for axes in (updates, starts):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training rows")
        axes.grid(alpha=0.3)
    starts.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(flags: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4_000, 40_000, 400_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--updates", type=int, default=200, help="dealt at most, in each repeat")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    arguments = parser.parse_args(flags)
    generator = np.random.default_rng(0)
    results = {}
    for num_rows in arguments.rows:
        lengths = log_normal(generator, num_rows).astype(np.int32)
        for num_processes in arguments.processes:
            found = measure(lengths, num_processes, arguments.updates)
            results[num_rows, num_processes] = found
    print(table(results))
    if arguments.plot is not None:
        save_plot(results, arguments.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
