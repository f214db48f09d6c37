"""Describe a run without training."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from accelerate import Accelerator
from torch import Tensor, nn

from lib.data.batching import PaddedBatches, Rows, padding_shares
from lib.data.splits import Splits, model_columns, row_lengths
from lib.data.tasks import IGNORED
from lib.distributed.collectives import precision
from lib.training.model import device_name, loss_sum

# Of the column of names; the longest is MNLI's validation_mismatched.
WIDTH = 23


def dry_run_lines(
    splits: Splits,
    tokenized: Splits,
    batches: Sequence[Sequence[Rows]],
    train_loader: Iterable[dict[str, Tensor]],
    collate: PaddedBatches,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    max_length: int,
    num_updates: int,
) -> Iterator[str]:
    """Yield the lines that `--dry_run` prints; runs one forward and one backward pass.

    Args:
        batches: the global batches of the first epoch.
        train_loader: the prepared loader of these batches, and `collate` its collator.
    """
    for name, rows in splits.all.items():
        labels = rows["labels"][:]
        unlabeled = sum(label == IGNORED for label in labels)
        yield _line(
            name, f"{len(rows):,} rows" + (f", {unlabeled:,} without labels" if unlabeled else "")
        )
    yield _line("labels", ", ".join(splits.task.labels) or "a score (regression)")
    yield _line("model inputs", ", ".join(model_columns(tokenized.train)))
    for number, (name, value) in enumerate(splits.train[0].items()):
        text = textwrap.shorten(str(value), 160, placeholder=" ...")
        yield _line("" if number else "first row", f"{name}: {text}")

    lengths = row_lengths(tokenized.train)
    yield _line("token lengths", f"{_listed(lengths[:8])} (the first training rows)")
    first = collate([tokenized.train[row] for row in range(min(8, len(lengths)))])
    first.pop("row")
    shapes = [f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in first.items()]
    yield _line("as one batch", ", ".join(shapes))
    truncated = sum(length == max_length for length in lengths)
    if truncated:
        yield _line(
            "truncation",
            f"{truncated:,} training rows have --max_length {max_length} tokens or more",
        )
    shares = padding_shares(
        lengths, batches, max_length=max_length, padded_length=collate.padded_length
    )
    yield _line("padding", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

    most = max(len(rows) for batch in batches for rows in batch)
    rows_of = [sum(map(len, batch)) for batch in batches]
    yield _line("updates", f"{len(batches):,} per epoch, {num_updates:,} in total")
    yield _line("global batch", f"{min(rows_of)} to {max(rows_of)} rows")
    yield _line("micro-batch", f"at most {most} rows")
    yield _line("processes", f"{accelerator.num_processes}")
    yield _line("gradient accumulation", f"{accelerator.gradient_accumulation_steps}")
    yield _line("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    yield _line("device", f"{device_name(accelerator.device)}, precision {precision(accelerator)}")
    yield _line("one backward pass", _one_pass(train_loader, model, accelerator))


def _line(name: str, value: str) -> str:
    return f"{name:<{WIDTH}}{value}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _one_pass(
    train_loader: Iterable[dict[str, Tensor]], model: nn.Module, accelerator: Accelerator
) -> str:
    batch = next(iter(train_loader))
    labels, _ = batch.pop("labels"), batch.pop("row")
    model.train()
    loss = loss_sum(model(**batch).logits, labels) / int((labels != IGNORED).sum())
    accelerator.backward(loss * accelerator.gradient_accumulation_steps)
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
    return f"loss {loss.item():.4f}, gradient norm {float(norm):.4f} (no optimizer step)"
