"""What a run would do, read back from what it would do it with."""

import math
from collections.abc import Iterable, Iterator, Sequence

from accelerate import Accelerator
from torch import Tensor, nn

from lib.data.batching import PaddedBatches, Rows, padding_shares
from lib.data.splits import Splits, model_columns, row_lengths
from lib.data.tasks import IGNORED
from lib.distributed.devices import device_name, precision
from lib.training.optimization import loss_sum


def describe(
    splits: Splits,
    tokenised: Splits,
    batches: Sequence[Sequence[Rows]],
    train_loader: Iterable[dict[str, Tensor]],
    collate: PaddedBatches,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    max_length: int,
    num_updates: int,
) -> Iterator[str]:
    """The lines that `--dry_run` prints; runs one forward and one backward pass.

    Args:
        batches: the global batches of the first epoch.
        train_loader: the prepared loader of these batches, and `collate` what makes them.
    """
    for name, rows in splits.all.items():
        labels = rows["labels"][:]
        withheld = sum(label == IGNORED for label in labels)
        yield f"{name}: {len(rows)} rows" + (f", {withheld} without a label" if withheld else "")
    yield f"labels: {', '.join(splits.task.labels) or 'a score'}"
    yield f"features: {', '.join(model_columns(tokenised.train))}"
    yield f"first example: {splits.train[0]}"

    lengths = row_lengths(tokenised.train)
    yield f"token lengths of the first 8 training rows: {lengths[:8]}"
    first = collate([tokenised.train[row] for row in range(min(8, len(lengths)))])
    first.pop("row")
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in first.items())
    yield f"the batch they make: {shapes}"
    truncated = sum(length == max_length for length in lengths)
    if truncated:
        yield f"at --max_length {max_length} (longer ones are truncated): {truncated} rows"

    shares = padding_shares(
        lengths, batches, max_length=max_length, padded_length=collate.padded_length
    )
    words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield f"share of padding: {words}"

    accumulation = accelerator.gradient_accumulation_steps
    most = max(len(rows) for batch in batches for rows in batch)
    rows_of = [sum(map(len, batch)) for batch in batches]
    yield f"updates: {len(batches)} per epoch, {num_updates} in all"
    yield (
        f"global batch: {min(rows_of)} to {max(rows_of)} rows = {accelerator.num_processes} "
        f"processes x at most {most} rows x {accumulation} accumulated"
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"parameters: {parameters:,}"
    yield f"device: {device_name(accelerator.device)}, precision: {precision(accelerator)}"
    yield _one_pass(train_loader, model, accelerator)


def _one_pass(
    train_loader: Iterable[dict[str, Tensor]], model: nn.Module, accelerator: Accelerator
) -> str:
    batch = next(iter(train_loader))
    labels, _ = batch.pop("labels"), batch.pop("row")
    model.train()
    loss = loss_sum(model(**batch).logits, labels) / int((labels != IGNORED).sum())
    accelerator.backward(loss * accelerator.gradient_accumulation_steps)
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
    return f"forward and backward pass: loss {loss.item():.4f}, gradient norm {float(norm):.4f}"
