"""What a run would do, read back from what it would do it with."""

import math
from collections.abc import Iterable, Iterator

import pyarrow.compute as pc
from accelerate import Accelerator
from torch import Tensor, nn

from lib.data.batching import FillingCollator, Plan, padding_shares
from lib.data.splits import Splits
from lib.data.tasks import IGNORED
from lib.data.tokenizing import model_columns, row_lengths
from lib.distributed.collectives import precision
from lib.training.model import device_name, loss_sum


def describe(
    splits: Splits,
    tokenized: Splits,
    plan: Plan,
    train_loader: Iterable[dict[str, Tensor]],
    collate: FillingCollator,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    max_length: int,
    num_updates: int,
) -> Iterator[str]:
    """The lines that `--dry_run` prints; runs one forward and one backward pass.

    Args:
        plan: the first epoch.
        train_loader: the prepared loader of its batches, and `collate` what makes them.
    """
    for name, rows in splits.all.items():
        withheld = pc.sum(pc.equal(rows.data.column("labels"), IGNORED)).as_py()
        yield f"{name}: {len(rows)} rows" + (f", {withheld} without a label" if withheld else "")
    yield f"labels: {', '.join(splits.task.labels) or 'a score'}"
    yield f"features: {', '.join(model_columns(tokenized.train))}"
    yield f"first example: {splits.train[0]}"

    lengths = row_lengths(tokenized.train)
    yield f"token lengths of the first 8 training rows: {lengths[:8].tolist()}"
    first = collate([tokenized.train[row] for row in range(min(8, len(lengths)))])
    first.pop("row")
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in first.items())
    yield f"the batch they make: {shapes}"
    truncated = int((lengths == max_length).sum())
    if truncated:
        yield f"at --max_length {max_length} (longer ones are truncated): {truncated} rows"

    shares = padding_shares(
        lengths, plan, max_length=max_length, padded_length=collate.padded_length
    )
    words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield f"share of padding: {words}"

    accumulation = accelerator.gradient_accumulation_steps
    yield f"updates: {len(plan)} per epoch, {num_updates} in all"
    yield (
        f"global batch: {plan.sizes.min()} to {plan.sizes.max()} rows = "
        f"{accelerator.num_processes} processes x at most {plan.most_rows} rows x "
        f"{accumulation} accumulated"
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
