"""Which rows form which micro-batch, and how they are padded.

The order is a pure function of `(seed, epoch)`: nothing to save, nothing to restore. An epoch is
a plan of global batches (the rows of one update, over all processes), each cut into micro-batches
(the rows of one forward pass on one process). Every row appears exactly once per epoch.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding

from lib.data.tasks import IGNORED

Integers = NDArray[np.integer[Any]]

# Global batches within which rows are sorted by length. Larger windows pad less but shuffle less:
# at 50, MRPC at 32 rows pads 1% to 2% of its tokens.
WINDOW = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Global batches in the order of their updates, cut from an array of rows on demand.

    `plan[update]` holds the micro-batches of an update, each an array of row numbers. With
    `lengths`, none is padded to more tokens than needed, and no process waits for another: see
    `deal`. Without, rows are dealt like cards, so that micro-batches differ by one row.

    Args:
        order: row numbers, those of a global batch side by side.
        starts, sizes: of each global batch, its first place in `order` and its number of rows.
        num_micro_batches: processes x accumulation. With fewer rows than that in a global batch,
            some of its micro-batches are empty.
        lengths: tokens of each row.
    """

    order: Integers
    starts: Integers
    sizes: Integers
    num_micro_batches: int = 1
    lengths: Integers | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, update: int) -> list[Integers]:
        start, count = self.starts[update], self.num_micro_batches
        rows = self.order[start : start + self.sizes[update]]
        if self.lengths is None or count == 1:
            return [rows[first::count] for first in range(count)]
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        ends = np.cumsum(deal(self.lengths[rows].tolist(), count))
        return np.split(rows, ends[:-1])

    def __iter__(self) -> Iterator[list[Integers]]:
        return (self[update] for update in range(len(self)))

    def part(self, first: int, last: int | None) -> "Plan":
        """The plan of the updates from `first` up to `last`, or to the end."""
        starts, sizes = self.starts[first:last], self.sizes[first:last]
        return dataclasses.replace(self, starts=starts, sizes=sizes)

    @property
    def most_rows(self) -> int:
        """Rows of the largest micro-batch where rows are dealt like cards."""
        return -(-int(self.sizes.max()) // self.num_micro_batches)


def deal(lengths: Sequence[int], num_parts: int) -> list[int]:
    """Cut rows into parts, each padded to its longest row, so that the largest has least tokens.

    Parts of long rows then have fewer rows. No part has more tokens than the largest of an even
    cut, which is kept where no other is better.

    Args:
        lengths: tokens of each row, longest first.

    Returns:
        The rows of each part, of which none is empty unless there are fewer rows than parts.
    """
    num_rows = len(lengths)
    even = _even_cuts(num_rows, num_parts)[1].tolist()
    if num_rows <= num_parts:
        return even

    def filled(most: int) -> list[int]:
        """Fill each part up to `most` tokens, but for a row for each part that follows."""
        counts: list[int] = []
        done = 0
        for following in range(num_parts - 1, -1, -1):
            counts.append(min(most // max(1, lengths[done]), num_rows - done - following))
            done += counts[-1]
        return counts

    # Found by halving: what fits into parts of so many tokens fits into larger ones.
    least, most = max(lengths[0], -(-sum(lengths) // num_parts)), even[0] * lengths[0]
    fits = range(least, most)
    found = least + bisect.bisect_left(fits, True, key=lambda most: sum(filled(most)) == num_rows)
    return even if found == most else filled(found)


def plan_epoch(
    lengths: Integers,
    epoch: int,
    *,
    seed: int,
    batch_size: int,
    num_micro_batches: int,
    length_grouping: bool = True,
    by_tokens: bool = True,
) -> Plan:
    """The global batches of one epoch.

    Rows are shuffled and, within windows of `WINDOW` global batches, sorted by length; the
    order of the batches is then shuffled. Batches are cut evenly: 3,668 rows at 32 are 115 batches
    of 31 or 32, not 114 and a stub of 20. The batch with the longest rows comes first, so that a
    run that does not fit into memory ends at once (if dealt by tokens, a later one may need more).

    Args:
        lengths: tokens of each row.
        batch_size: rows of a global batch at the most.
        num_micro_batches: as for `Plan`.
        by_tokens: give the micro-batches of an update equally many tokens, not rows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).astype(np.int32)  # half the memory of each process
    num_batches = -(-len(order) // batch_size)
    starts, sizes = _even_cuts(len(order), num_batches)
    if length_grouping:
        window_starts, _ = _even_cuts(num_batches, max(1, round(num_batches / WINDOW)))
        for rows in np.split(order, starts[window_starts[1:]]):  # views: sorted in place
            rows[:] = rows[np.argsort(lengths[rows], kind="stable")]
        batches = generator.permutation(num_batches)
        starts, sizes = starts[batches], sizes[batches]
        longest = np.argmax(lengths[order[starts + sizes - 1]])
        first = np.concatenate([[longest], np.delete(np.arange(num_batches), longest)])
        starts, sizes = starts[first], sizes[first]
    return Plan(order, starts, sizes, num_micro_batches, lengths if by_tokens else None)


def plan_evaluation(lengths: Integers, *, batch_size: int, num_processes: int) -> Plan:
    """Every row once, longest first, in equally many batches for each process.

    Evenly cut, so with fewer rows than processes some batches are empty: a process must not
    leave the others waiting in a forward pass that communicates.
    """
    order = np.argsort(-lengths, kind="stable")
    rounds = -(-len(order) // (batch_size * num_processes))
    return Plan(order, *_even_cuts(len(order), max(1, rounds) * num_processes))


def _even_cuts(num_rows: int, num_parts: int) -> tuple[Integers, Integers]:
    """Starts and sizes of the parts that `numpy.array_split` cuts."""
    sizes = np.full(num_parts, num_rows // num_parts)
    sizes[: num_rows % num_parts] += 1
    return np.cumsum(sizes) - sizes, sizes


class MicroBatches(Sampler[list[int]]):
    """A batch sampler over the micro-batches of an epoch, from any update to any other.

    Accelerate deals its batches round robin to the processes, whatever their sizes, as long as
    `batch_size` is None and `even_batches` is False (accelerate 1.15, `BatchSamplerShard`).

    Args:
        plan: the plan of an epoch, from its number; made once while an epoch lasts.
        per_epoch: updates of every epoch; by default, those of epoch 0, which is then planned.
        num_micro_batches: of an update at first; by default as many as planned for epoch 0.

    Attributes:
        num_micro_batches: of an update. When it changes, `updates` repeats its last update with as
            many.
    """

    batch_size = None
    drop_last = False

    def __init__(
        self,
        plan: Callable[[int], Plan],
        per_epoch: int | None = None,
        num_micro_batches: int | None = None,
    ) -> None:
        self.planned = functools.lru_cache(maxsize=1)(plan)
        self.per_epoch = per_epoch or len(self.planned(0))
        self.num_micro_batches = num_micro_batches or self.planned(0).num_micro_batches

    @functools.cached_property
    def batches(self) -> Plan:
        """What the next iteration yields: epoch 0, until `start` sets it."""
        return self.plan(0)

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, in `num_micro_batches` for each update."""
        planned = self.planned(epoch)
        return dataclasses.replace(planned, num_micro_batches=self.num_micro_batches)

    def start(self, *, epoch: int, first: int = 0, last: int | None = None) -> Plan:
        """The updates `first` to `last` of `epoch`, which the next iteration yields."""
        assert len(self.plan(epoch)) == self.per_epoch
        self.batches = self.plan(epoch).part(first, last)
        return self.batches

    def updates(
        self, loader: Iterable[Any], num_processes: int, first: int, last: int
    ) -> Iterator[tuple[list[Integers], Iterator[dict[str, torch.Tensor]]]]:
        """Yield the rows and this process's micro-batches of the updates `first` up to `last`.

        Micro-batches are fetched one by one, as Accelerate synchronizes the gradients at the last
        one that its loader has yielded.

        Args:
            loader: a prepared loader with this sampler.
            num_processes: that it deals the micro-batches to.
        """
        while first < last:
            epoch, done = divmod(first, self.per_epoch)
            plan = self.start(epoch=epoch, first=done, last=done + last - first)
            micro_batches = iter(loader)
            for rows in plan:
                yield rows, itertools.islice(micro_batches, plan.num_micro_batches // num_processes)
                if plan.num_micro_batches != self.num_micro_batches:
                    break
                first += 1
            else:
                assert next(micro_batches, None) is None  # and Accelerate has left the loader

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            for rows in batch:
                yield rows.tolist()

    def __len__(self) -> int:
        return len(self.batches) * self.batches.num_micro_batches


@dataclasses.dataclass(frozen=True)
class FillingCollator:
    """Pads rows with `DataCollatorWithPadding`, and fills up what must not be empty.

    A filling row has the label `IGNORED` and the row number -1. Its tokens are those of the first
    row (BART wants equally many separators in all), or, where there is none, a padding token.

    Args:
        pad: the collator that pads.
        columns: what tokenized rows hold for the model (`input_ids`, ...).
        max_length: tokens of the longest row.
        num_rows: fill up to this many rows; None fills only what would be empty.
    """

    pad: DataCollatorWithPadding
    columns: Sequence[str]
    max_length: int
    num_rows: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of shape (rows, longest) for the model, and `labels` and `row` of (rows,)."""
        # Not "": GPT-2's tokenizer would give a row without tokens.
        tokens = rows[0] if rows else self.pad.tokenizer(self.pad.tokenizer.pad_token)
        filling = {name: tokens[name] for name in self.columns} | {"labels": IGNORED, "row": -1}
        return dict(self.pad(rows + [filling] * ((self.num_rows or 1) - len(rows))))

    def resized(self, num_rows: int) -> "FillingCollator":
        """Return the same collator for micro-batches of up to `num_rows` rows."""
        return self if self.num_rows is None else dataclasses.replace(self, num_rows=num_rows)

    def padded_length(self, longest: Integers) -> Integers:
        """Tokens to which micro-batches are padded, from those of their longest rows."""
        if self.pad.padding == "max_length":
            longest = np.full_like(longest, self.pad.max_length)
        multiple = self.pad.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def compiled_multiple(max_length: int) -> int:
    """The multiple to pad lengths to where each shape costs a compilation.

    A quarter of `max_length`, or a third, a half or all of it if that does not divide it: four
    shapes at the most, none longer than `max_length`, which may be all that the model takes.
    """
    return next(max_length // parts for parts in (4, 3, 2, 1) if max_length % parts == 0)


def longest_row(longest: Integers) -> Integers:
    """The padded length of micro-batches that are padded to their longest rows."""
    return longest


class Tokens(NamedTuple):
    """Tokens of rows.

    Attributes:
        real: without padding.
        padded: to which the micro-batches are padded.
        squares: the sum of the squared lengths of the rows, without padding.
    """

    real: int
    padded: int
    squares: int


def num_tokens(
    lengths: Integers,
    micro_batches: Iterable[Integers],
    padded_length: Callable[[Integers], Integers] = longest_row,
) -> Tokens:
    """Count the tokens of `micro_batches`.

    Args:
        lengths: tokens of each row.
        padded_length: from the lengths of their longest rows to what micro-batches are padded to.
    """
    filled = [rows for rows in micro_batches if len(rows)]
    sizes = np.array([len(rows) for rows in filled])
    tokens = lengths[np.concatenate(filled)]
    longest = np.maximum.reduceat(tokens, np.cumsum(sizes) - sizes)
    squares = int(np.square(tokens, dtype=np.int64).sum())
    return Tokens(int(tokens.sum()), int((sizes * padded_length(longest)).sum()), squares)


def padding_share(
    lengths: Integers,
    micro_batches: Iterable[Integers],
    padded_length: Callable[[Integers], Integers] = longest_row,
) -> float:
    """Fraction of the tokens of `micro_batches` that is padding; arguments as in `num_tokens`."""
    tokens = num_tokens(lengths, micro_batches, padded_length)
    return 1 - tokens.real / tokens.padded


def padding_shares(lengths: Integers, plan: Plan, collator: FillingCollator) -> dict[str, float]:
    """Return the share of padding in the tokens of an epoch, for three ways of batching.

    At a fixed length, in dynamically padded batches of rows as they come, and as planned.

    Args:
        lengths: tokens of each row.
        plan: the epoch of this run, whose micro-batches `collator` pads.
    """
    in_order = np.array_split(np.arange(len(lengths)), len(plan))
    micro_batches = (rows for batch in plan for rows in batch)
    return {
        "fixed length": 1 - int(lengths.sum()) / (len(lengths) * collator.max_length),
        "plain dynamic": padding_share(lengths, in_order),
        "this run": padding_share(lengths, micro_batches, collator.padded_length),
    }


def dropout_seed(seed: int, update: int, micro_batch: int, process_index: int) -> int:
    """The 32-bit seed of the generators for one forward pass, so that none needs saving.

    Source: NumPy's SeedSequence, which mixes its entropy so that close numbers give far seeds.
    """
    entropy = np.random.SeedSequence([seed, update, micro_batch, process_index])
    return int(entropy.generate_state(1)[0])
