"""Describe a run: its header, and what `--dry_run` prints."""

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lib.backends.devices import degradations, device_name, precision
from lib.data.batching import FillingCollator, MicroBatches, padding_shares
from lib.data.files.paths import shown
from lib.data.rows.notices import row_notices
from lib.data.splits import Splits
from lib.data.tasks import IGNORED
from lib.data.tokenizing import model_columns, row_lengths
from lib.errors import InputError
from lib.training.optimization import loss_sum
from lib.training.timetable import Timetable

# Of the column of names; the longest is MNLI's validation_mismatched.
WIDTH = 23


def announce(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    splits: Splits,
    tokenized: Splits,
    tokenizer: PreTrainedTokenizerBase,
    timetable: Timetable,
    accelerator: Accelerator,
) -> None:
    """Print the header of a run, and how it falls short of what was asked.

    The header: `train_mrpc: bert-base-uncased (109.5M) on glue, 3,668/408/1,725 rows, 2 classes,
    575 updates of 32 rows, CPU (2 threads) -> outputs/mrpc`.

    Args:
        config: the resolved configuration, as config.yaml has it.
        provenance: as `results.provenance` returns it.
    """
    if not accelerator.is_main_process:
        return
    model = Path(config["model_name_or_path"]).name
    data = shown(config["train_file"] or [config["dataset_name"]])
    rows = "/".join(f"{len(rows):,}" for rows in splits.all.values())
    kind = f"{len(splits.task.labels)} classes" if splits.task.labels else "scores"
    print(
        f"train_mrpc: {model} ({provenance['num_parameters'] / 1e6:.1f}M) on {data}, {rows} rows, "
        f"{kind}, {timetable.num_updates:,} updates of {config['train_batch_size']} rows, "
        f"{provenance['device']} -> {config['output_dir']}",
        flush=True,
    )
    notices = [
        *degradations(accelerator),
        *splits.notices,
        *row_notices(splits.task.labels, splits.all, tokenized.all, config["max_length"]),
    ]
    if not splits.task.labels and config["task_name"] is None:
        notices.append("the labels have decimals: training for scores (a regression), not classes")
    if config["use_slow_tokenizer"] and tokenizer.is_fast:
        notices.append("this model has no slow tokenizer: using the fast one")
    if weights := provenance["label_weights"]:
        listed = ", ".join(f"{label} {weight:.4g}" for label, weight in weights.items())
        notices.append(f"weights of the classes in the loss: {listed}")
    if config["freeze_layers"] is not None or config["lora_rank"] is not None:
        total, trained = provenance["num_parameters"], provenance["num_trained"]
        notices.append(f"{trained:,} of {total:,} parameters are trained, the others are frozen")
    elif frozen := provenance["frozen"]:
        names = ", ".join(frozen[:3]) + (f" and {len(frozen) - 3} more" if frozen[3:] else "")
        notices.append(f"frozen, as the logits do not depend on it: {names}")
    for notice in notices:
        print(notice, file=sys.stderr)


def describe(
    splits: Splits,
    tokenized: Splits,
    sampler: MicroBatches,
    collator: FillingCollator,
    train_loader: DataLoader[Any],
    model: nn.Module,
    accelerator: Accelerator,
    timetable: Timetable,
) -> None:
    """Print what a run would do, and do one forward and one backward pass.

    Args:
        train_loader: the prepared loader of `sampler`.
    """
    say = partial(_say, accelerator)
    plan, max_length = sampler.plan(0), collator.max_length
    for name, rows in splits.all.items():
        unlabeled = pc.sum(pc.equal(rows.data.column("labels"), IGNORED)).as_py()
        say(name, f"{len(rows):,} rows" + (f", {unlabeled:,} without labels" if unlabeled else ""))
    found = row_notices(splits.task.labels, splits.all, tokenized.all, max_length)
    for notice in (*splits.notices, *found):
        say("notice", notice)
    say("labels", ", ".join(splits.task.labels) or "a score (regression)")
    say("model inputs", ", ".join(model_columns(tokenized.train)))
    for number, (name, value) in enumerate(splits.train[0].items()):
        text = textwrap.shorten(str(value), 160, placeholder=" ...")
        say("" if number else "first row", f"{name}: {text}")

    lengths = row_lengths(tokenized.train)
    say("token lengths", f"{_listed(lengths[:8].tolist())} (the first training rows)")
    first = collator([tokenized.train[row] for row in range(min(8, len(lengths)))])
    first.pop("row")
    shapes = [f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in first.items()]
    say("as one batch", ", ".join(shapes))
    shares = padding_shares(lengths, plan, collator)
    say("padding", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

    say("updates", f"{len(plan):,} per epoch, {timetable.num_updates:,} in total")
    say("global batch", f"{plan.sizes.min()} to {plan.sizes.max()} rows")
    by_tokens = plan.lengths is not None and plan.num_micro_batches > 1
    rows = f"about {plan.most_rows} rows, of equally many tokens"
    say("micro-batch", rows if by_tokens else f"at most {plan.most_rows} rows")
    say("processes", f"{accelerator.num_processes}")
    say("gradient accumulation", f"{accelerator.gradient_accumulation_steps}")
    say("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    say("device", device_name(accelerator.device))
    say("precision", {"no": "fp32"}.get(precision(accelerator), precision(accelerator)))
    say("one backward pass", _one_pass(train_loader, model, accelerator))


def _say(accelerator: Accelerator, name: str, value: str) -> None:
    if accelerator.is_main_process:
        print(f"{name:<{WIDTH}}{value}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _one_pass(
    train_loader: Iterable[dict[str, Tensor]], model: nn.Module, accelerator: Accelerator
) -> str:
    batch = next(iter(train_loader))
    labels, _ = batch.pop("labels"), batch.pop("row")
    model.train()
    try:
        loss = loss_sum(model(**batch).logits, labels) / int((labels != IGNORED).sum())
        accelerator.backward(loss * accelerator.gradient_accumulation_steps)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise InputError(
            f"one backward pass: out of memory with {len(labels)} rows in a micro-batch; "
            "--per_device_train_batch_size auto trains with as many as fit"
        ) from error
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
    return f"loss {loss.item():.4f}, gradient norm {float(norm):.4f} (no optimizer step)"
