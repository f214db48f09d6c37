"""Which rows form which micro-batch, and how they are padded.

The order is a pure function of `(seed, epoch)`: nothing to save, nothing to restore. An epoch is
a list of global batches (the rows of one update, over all processes), each a list of micro-batches
(the rows of one forward pass on one process). Every row appears exactly once per epoch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lib.data.tasks import IGNORED

Rows = list[int]

# Global batches within whose rows are sorted by length. Fewer leave more padding; more leave
# less chance in who meets whom. At 50, MRPC at 32 rows pads 1% to 2% of its tokens.
WINDOW = 50


def global_batches(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    num_micro_batches: int,
    length_grouping: bool = True,
) -> list[list[Rows]]:
    """The global batches of one epoch, in order, each cut into its micro-batches.

    Rows are shuffled and, within windows of `WINDOW` global batches, sorted by length; the
    order of the batches is then shuffled. Batches are cut evenly, as `numpy.array_split` does:
    3,668 rows at 32 are 115 batches of 31 or 32, not 114 and a stub of 20. Within a batch the
    rows are dealt like cards, so its micro-batches differ by one row and few tokens, and no
    process waits for another. The batch with the longest rows comes first, so that a run that
    does not fit into memory ends at once.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a global batch at the most.
        num_micro_batches: processes x accumulation. With fewer rows than that in a batch, some
            of its micro-batches are empty.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    num_batches = -(-len(order) // batch_size)
    cuts = np.cumsum([len(part) for part in np.array_split(order, num_batches)])[:-1]
    if length_grouping:
        tokens = np.asarray(lengths)
        num_windows = max(1, round(num_batches / WINDOW))
        starts = [part[0] for part in np.array_split(np.arange(num_batches), num_windows)]
        edges = np.concatenate([[0], cuts])[starts[1:]]
        windows = np.split(order, edges)
        order = np.concatenate([rows[np.argsort(tokens[rows], kind="stable")] for rows in windows])
    batches: list[NDArray[np.int64]] = np.split(order, cuts)
    if length_grouping:
        batches = [batches[index] for index in generator.permutation(num_batches)]
        longest = max(range(num_batches), key=lambda index: int(tokens[batches[index]].max()))
        batches.insert(0, batches.pop(longest))
    return [
        [rows[first::num_micro_batches].tolist() for first in range(num_micro_batches)]
        for rows in batches
    ]


def evaluation_batches(
    lengths: Sequence[int], *, batch_size: int, num_processes: int
) -> list[Rows]:
    """Every row once, longest first, in equally many batches for each process.

    Evenly cut, so with fewer rows than processes some batches are empty: a process must not
    leave the others waiting in a forward pass that communicates.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    rounds = -(-len(order) // (batch_size * num_processes))
    return [rows.tolist() for rows in np.array_split(order, max(1, rounds) * num_processes)]


class MicroBatches(Sampler[Rows]):
    """A batch sampler over the micro-batches of an epoch, from any update to any other.

    Accelerate deals its batches round robin to the processes, whatever their sizes, as long as
    `batch_size` is None and `even_batches` is False (accelerate 1.15, `BatchSamplerShard`).

    Args:
        plan: the global batches of an epoch, from its number.
    """

    batch_size = None
    drop_last = False

    def __init__(self, plan: Callable[[int], list[list[Rows]]]) -> None:
        self.plan = plan
        self.start(epoch=0)

    def start(self, *, epoch: int, first: int = 0, last: int | None = None) -> list[list[Rows]]:
        """The global batches `first` to `last` of `epoch`; the next iteration yields these."""
        self.batches = self.plan(epoch)[first:last]
        return self.batches

    def __iter__(self) -> Iterator[Rows]:
        for batch in self.batches:
            yield from batch

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def updates(
        self, loader: Iterable[Any], accumulation: int, *, first: int, last: int
    ) -> Iterator[tuple[list[Rows], Iterator[Any]]]:
        """Yield the rows and this process's micro-batches of the updates `first` to `last`.

        Micro-batches are fetched as they are needed: Accelerate synchronizes gradients at the last
        one that its loader has yielded.

        Args:
            loader: a prepared loader with this sampler.
            accumulation: micro-batches of each process for one update.
            first: updates that are done.
            last: updates when the run is done.
        """
        per_epoch = len(self.plan(0))
        while first < last:
            epoch, index = divmod(first, per_epoch)
            batches = self.start(epoch=epoch, first=index, last=index + last - first)
            micro_batches = iter(loader)
            for rows in batches:
                yield rows, itertools.islice(micro_batches, accumulation)
            assert next(micro_batches, None) is None  # also ends the loader's epoch for Accelerate
            first += len(batches)

    @property
    def most_rows(self) -> int:
        """Rows of the largest micro-batch."""
        return max(len(rows) for batch in self.batches for rows in batch)


@dataclasses.dataclass
class PaddedBatches:
    """Collates rows through `DataCollatorWithPadding`, and fills up what must not be empty.

    A filling row is `[CLS] [SEP]` with the label `IGNORED` and the row number -1. Where compiled
    shapes matter (TPU, CUDA graphs), `num_rows` and `lengths` leave few of them.

    Args:
        pad: the collator that pads; its own length is the longest row.
        filling: a tokenised empty row.
        num_rows: fill up to this many rows.
        lengths: pad to the first of these ascending lengths that fits; none: to the longest row.
    """

    pad: DataCollatorWithPadding
    filling: dict[str, Any]
    num_rows: int = 1
    lengths: tuple[int, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of shape (rows, longest) for the model, and `labels` and `row` of (rows,)."""
        rows = rows + [self.filling] * (self.num_rows - len(rows))
        if self.pad.padding == "max_length":
            self.pad.max_length = self.padded_length(max(len(row["input_ids"]) for row in rows))
        return dict(self.pad(rows))

    def padded_length(self, longest: int) -> int:
        """Tokens to which the rows of a micro-batch are padded, from those of its longest."""
        return next((length for length in self.lengths if length >= longest), longest)


def collator(
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str],
    max_length: int,
    pad_to_max_length: bool,
    num_rows: int | None = None,
) -> PaddedBatches:
    """The collator of a run.

    Args:
        columns: what the tokenised rows hold for the model (`input_ids`, ...).
        num_rows: rows of every micro-batch where compiled shapes matter; None elsewhere. Lengths
            are then multiples of a quarter of `max_length`.
    """
    empty = tokenizer("", truncation=True, max_length=max_length)
    filling = {name: empty[name] for name in columns} | {"labels": IGNORED, "row": -1}
    lengths: tuple[int, ...] = ()
    if pad_to_max_length:
        lengths = (max_length,)
    elif num_rows is not None:
        lengths = tuple(-(-max_length * quarter // 4) for quarter in (1, 2, 3, 4))
    pad = DataCollatorWithPadding(tokenizer, padding="max_length" if lengths else "longest")
    return PaddedBatches(pad, filling, num_rows or 1, lengths)


def num_tokens(
    lengths: Sequence[int],
    batches: Sequence[Rows],
    padded_length: Callable[[int], int] = lambda longest: longest,
) -> tuple[int, int]:
    """Tokens of `batches`: the real ones, and those that they are padded to.

    Args:
        lengths: tokens of each row.
        padded_length: tokens to which a batch is padded, from those of its longest row.
    """
    own = [[lengths[row] for row in rows] for rows in batches if rows]
    padded = sum(len(rows) * padded_length(max(rows)) for rows in own)
    return sum(map(sum, own)), padded


def padding_share(
    lengths: Sequence[int],
    batches: Sequence[Rows],
    padded_length: Callable[[int], int] = lambda longest: longest,
) -> float:
    """Fraction of the tokens of `batches` that is padding; arguments as in `num_tokens`."""
    real, padded = num_tokens(lengths, batches, padded_length)
    return 1 - real / padded


def padding_shares(
    lengths: Sequence[int],
    batches: Sequence[Sequence[Rows]],
    *,
    max_length: int,
    padded_length: Callable[[int], int],
) -> dict[str, float]:
    """The fraction of the tokens of an epoch that is padding, for three ways of batching.

    At a fixed length, in dynamically padded batches of rows as they come, and in `batches`.

    Args:
        lengths: tokens of each row.
        batches: the global batches of this run, each a list of micro-batches.
        max_length: tokens to which the first way pads.
        padded_length: as for `padding_share`, for this run's micro-batches.
    """
    in_order = [part.tolist() for part in np.array_split(np.arange(len(lengths)), len(batches))]
    micro_batches = [rows for batch in batches for rows in batch]
    return {
        "fixed length": 1 - sum(lengths) / (len(lengths) * max_length),
        "plain dynamic": padding_share(lengths, in_order),
        "this run": padding_share(lengths, micro_batches, padded_length),
    }


def dropout_seed(seed: int, update: int, micro_batch: int, process_index: int) -> int:
    """The 32-bit seed of the generators for one forward pass, so that none needs saving.

    Source: NumPy's SeedSequence, which mixes its entropy so that close numbers give far seeds.
    """
    entropy = np.random.SeedSequence([seed, update, micro_batch, process_index])
    return int(entropy.generate_state(1)[0])
