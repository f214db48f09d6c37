"""How evenly schemes of batching share the work of an update, what they pad, and how fair they are.

    python -m benchmarks.batches [--dataset_name DIR --model_name_or_path DIR]

Counts tokens and trains nothing. Against plan_epoch, the samplers of transformers' Trainer
(`train_sampling_strategy` random, group_by_length and batch_rebalance), dealt as Accelerate deals
them. Every process has the same number of rows in an update on average, in one forward pass.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets.utils.logging import disable_progress_bar
from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr
from torch.utils.data import BatchSampler, RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from benchmarks.scale import MAX_LENGTH
from lib.data.batching import Integers, num_tokens, plan_epoch
from lib.data.splits import load_splits
from lib.data.tokenizing import row_lengths

LONGEST = 512
# Rows of each update, on each process: `updates[update][process]`.
Updates = list[Sequence[Integers]]


def qqp_like(generator: np.random.Generator, num_rows: int) -> Integers:
    """Pairs of short questions, a few of them long: log-normal, median 28 tokens, sigma 0.4."""
    return generator.lognormal(np.log(28), 0.4, num_rows).round().clip(8, LONGEST).astype(int)


def log_normal(generator: np.random.Generator, num_rows: int) -> Integers:
    """Those of transformers' benchmark, mu 5 and sigma 1, from 16 tokens up (there to 1,024).

    Source: https://github.com/huggingface/transformers/pull/47340
    """
    return generator.lognormal(5, 1, num_rows).round().clip(16, LONGEST).astype(int)


def pareto(generator: np.random.Generator, num_rows: int) -> Integers:
    """Mostly short rows and a heavy tail: Pareto from 20 tokens up, with exponent 1.2."""
    return (20 * (1 + generator.pareto(1.2, num_rows))).round().clip(20, LONGEST).astype(int)


def mrpc(dataset_name: str, model_name_or_path: str) -> Integers:
    """Tokens of the training pairs, as the script encodes them."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    splits = load_splits(dataset_name, task_name="mrpc")
    return row_lengths(splits.tokenized(tokenizer, max_length=MAX_LENGTH).train)


def ours(lengths: Integers, epoch: int, num_processes: int, rows: int, **options: bool) -> Updates:
    return list(
        plan_epoch(
            lengths,
            epoch,
            seed=42,
            batch_size=rows * num_processes,
            num_micro_batches=num_processes,
            **options,
        )
    )


def random_shuffle(lengths: Integers, epoch: int, num_processes: int, rows: int) -> Updates:
    generator = torch.Generator().manual_seed(42 + epoch)
    return dealt(RandomSampler(lengths, generator=generator), num_processes, rows)


def group_by_length(lengths: Integers, epoch: int, num_processes: int, rows: int) -> Updates:
    generator = torch.Generator().manual_seed(42 + epoch)
    sampler = LengthGroupedSampler(rows, lengths=lengths.tolist(), generator=generator)
    return dealt(sampler, num_processes, rows)


def dealt(sampler: Any, num_processes: int, rows: int) -> Updates:
    """Deal batches as Accelerate does by default, which repeats rows at the end of an epoch."""
    batches = list(BatchSampler(sampler, rows, drop_last=False))
    shards = [
        BatchSamplerShard(Batches(batches, rows), num_processes, index)
        for index in range(num_processes)
    ]
    return [list(map(np.array, update)) for update in zip(*shards, strict=True)]


class Batches(list[list[int]]):
    """Batches that are drawn once, for all the shards."""

    drop_last = False

    def __init__(self, batches: list[list[int]], batch_size: int) -> None:
        super().__init__(batches)
        self.batch_size = batch_size


class RebalancedForAll(BatchRebalanceSampler):
    """Yields the micro-batches of all processes, each of which would compute them all anew."""

    def _yield_global_batch(self, batch_indices: list[int]) -> Iterator[Any]:
        yield self._assign(batch_indices, [self.lengths[row] for row in batch_indices])


def batch_rebalance(lengths: Integers, epoch: int, num_processes: int, rows: int) -> Updates:
    sampler = RebalancedForAll(
        lengths.tolist(), rows * num_processes, dp_size=num_processes, grad_accum=1, drop_last=False
    )
    sampler.set_epoch(epoch)
    return [[np.array(micro_batch) for (micro_batch,) in update] for update in sampler]


SCHEMES: dict[str, Callable[[Integers, int, int, int], Updates]] = {
    "this script": ours,
    "this script, `--per_device_train_batch_size`": functools.partial(ours, by_tokens=False),
    "this script, `--length_grouping false`": functools.partial(ours, length_grouping=False),
    "random shuffle": random_shuffle,
    "`group_by_length`": group_by_length,
    "`batch_rebalance`": batch_rebalance,
}


def figures(lengths: Integers, updates: Updates) -> dict[str, float]:
    """The figures of one epoch.

    Returns:
        slowest, slowest_p90: padded tokens of the slowest process over the mean of all, as the mean
            and 90th percentile over the updates.
        slowest_cost: the same mean by the cost that `batch_rebalance` balances, which adds a
            quadratic term for attention.
        padding: share of the tokens computed.
        waited: tokens for which an epoch waits, over the real ones: those of the slowest process in
            each update, as if all had as many. 1 would be no padding and no waiting.
        position: Spearman's correlation of the length of a row with the number of its update.
        clustered: share of the variance of lengths (their ranks) that lies between updates.
    """
    counts = np.array([[num_tokens(lengths, [part])[1] for part in update] for update in updates])
    longest = np.array([[lengths[part].max() for part in update] for update in updates])
    slowest = counts.max(axis=1) / counts.mean(axis=1)
    costs = counts * (1 + BatchRebalanceSampler.QUADRATIC_COST_COEF * longest)
    rows = [np.concatenate(update) for update in updates]
    sizes = [len(update) for update in rows]
    position = np.repeat(np.arange(len(rows)), sizes)
    tokens = lengths[np.concatenate(rows)]
    ranks = rankdata(tokens)
    means = np.array([part.mean() for part in np.split(ranks, np.cumsum(sizes)[:-1])])
    return {
        "slowest": slowest.mean(),
        "slowest_p90": np.quantile(slowest, 0.9),
        "slowest_cost": (costs.max(axis=1) / costs.mean(axis=1)).mean(),
        "padding": 1 - tokens.sum() / counts.sum(),
        "waited": counts.max(axis=1).sum() * counts.shape[1] / tokens.sum(),
        "position": spearmanr(tokens, position).statistic,
        "clustered": np.average((means - ranks.mean()) ** 2, weights=sizes) / ranks.var(),
    }


def simulate(
    lengths: Integers, num_processes: int, rows: int, num_epochs: int
) -> dict[str, dict[str, float]]:
    """The figures of each scheme: means over the epochs, of `position` that of its size."""
    results = {}
    for name, scheme in SCHEMES.items():
        epochs = [
            figures(lengths, scheme(lengths, epoch, num_processes, rows))
            for epoch in range(num_epochs)
        ]
        results[name] = {
            key: float(np.mean([abs(epoch[key]) for epoch in epochs])) for key in epochs[0]
        }
    return results


def table(results: dict[str, dict[int, dict[str, dict[str, float]]]]) -> str:
    """The simulations in Markdown, a line for each kind of lengths and scheme."""
    numbers = " / ".join(str(number) for number in next(iter(results.values())))
    lines = [
        f"On {numbers} processes:",
        "",
        "| lengths | scheme | slowest / mean | 90th percentile | same by cost | padding, % "
        "| waited for / real | position | clustered, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {
        "slowest": (1, ".2f"),
        "slowest_p90": (1, ".2f"),
        "slowest_cost": (1, ".2f"),
        "padding": (100, ".1f"),
        "waited": (1, ".2f"),
        "position": (1, ".2f"),
        "clustered": (100, ".0f"),
    }
    for kind, by_number in results.items():
        for scheme in SCHEMES:
            cells = [
                " / ".join(f"{unit * found[scheme][key]:{form}}" for found in by_number.values())
                for key, (unit, form) in columns.items()
            ]
            lines.append(f"| {' | '.join([kind, scheme, *cells])} |")
    return "\n".join(lines)


def save_plot(results: dict[str, dict[int, dict[str, dict[str, float]]]], path: Path) -> None:
    """Draw the tokens waited for against the number of processes, a panel for each kind."""
    figure = Figure((3.2 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    colors = ("#0072B2", "#009E73", "#56B4E9", "#999999", "#E69F00", "#D55E00")
    for axes, (kind, by_number) in zip(panels, results.items(), strict=True):
        for (scheme, color), marker in zip(
            zip(SCHEMES, colors, strict=True), "oDPsv^", strict=True
        ):
            waited = [by_scheme[scheme]["waited"] for by_scheme in by_number.values()]
            label = scheme.replace("`", "")
            axes.plot(list(by_number), waited, marker=marker, color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_number), [str(number) for number in by_number])
        axes.set_xlabel("processes")
        axes.set_title(kind)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("tokens waited for / real tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(SCHEMES) // 2, frameon=False
    )
    figure.savefig(path, dpi=150)


def main(flags: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset_name", help="MRPC, as for the script; without it: no real rows")
    parser.add_argument("--model_name_or_path", help="whose tokenizer counts the tokens of MRPC")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rows_per_process", type=int, default=16)
    parser.add_argument("--rows", type=int, default=40_000, help="of each kind but MRPC")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--shown", type=int, nargs="+", help="processes in the table; default: all")
    parser.add_argument("--plot", type=Path, help="file for a picture of all")
    arguments = parser.parse_args(flags)
    if (arguments.dataset_name is None) != (arguments.model_name_or_path is None):
        parser.error("--dataset_name and --model_name_or_path belong together")
    generator = np.random.default_rng(0)
    kinds = {
        "QQP-like": qqp_like(generator, arguments.rows),
        "log-normal": log_normal(generator, arguments.rows),
        "Pareto": pareto(generator, arguments.rows),
    }
    if arguments.dataset_name is not None:
        kinds = {"MRPC": mrpc(arguments.dataset_name, arguments.model_name_or_path), **kinds}
    results: dict[str, dict[int, dict[str, dict[str, float]]]] = {kind: {} for kind in kinds}
    for (kind, lengths), number in itertools.product(kinds.items(), arguments.processes):
        simulated = simulate(lengths, number, arguments.rows_per_process, arguments.epochs)
        results[kind][number] = simulated
        print(json.dumps({f"{kind}, {number}": simulated}), file=sys.stderr, flush=True)
    shown = arguments.shown or arguments.processes
    print(table({kind: {number: by[number] for number in shown} for kind, by in results.items()}))
    if arguments.plot is not None:
        save_plot(results, arguments.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
