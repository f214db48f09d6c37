"""Fine-tune BERT on GLUE/MRPC with Accelerate, on any number of processes.

    accelerate launch train_mrpc.py                        BERT base on MRPC, from the hub
    accelerate launch train_mrpc.py --demo                 a minute, with nothing to download
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml train_mrpc.py

A run is a function of its configuration: the order of the rows is one of (seed, epoch), the
learning rate one of the update, the dropout one of (seed, update, micro-batch, process). What
training computes, the weights and moments, is all that a checkpoint has to hold.

An `update` is one step of the optimizer; its rows, over all processes, are the global batch; a
`micro-batch` is the rows of one forward pass on one process.
"""

import os
import sys

from lib.distributed.signals import Signals, ignore_stop_signals

SIGNALS = Signals()

if __name__ == "__main__":
    # First of all, as a run may be told to stop while it starts.
    SIGNALS.listen(at_once=os.environ.get("WORLD_SIZE", "1") == "1")

from lib.cli.config import TrainConfig, num_warmup_updates, resolve_batch_sizes
from lib.cli.parsing import exit_status, hide_token, parse_arguments
from lib.hub.reach import settle

if __name__ == "__main__":
    # Before the seconds that the imports below take, and before they look for the hub.
    with exit_status():
        CONFIG = parse_arguments(sys.argv[1:])
        hide_token(sys.argv)
        settle(
            CONFIG.model_name_or_path,
            CONFIG.model_revision,
            CONFIG.dataset_name if CONFIG.train_file is None else None,
        )
    if os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        # The gradient of a vocabulary is new memory at every update: a dozen page faults instead
        # of thousands. PyTorch reads this once, and warns on kernels that have no such pages.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import dataclasses
import math
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    broadcast_object_list,
    set_seed,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.checkpoints import checkpoint, output, resume
from lib.checkpoints.best_model import export, restore
from lib.checkpoints.lock import Lock
from lib.data import batching
from lib.data import splits as data
from lib.distributed.collectives import (
    Agreement,
    check_world,
    degradations,
    on_main_process,
    once_per_machine,
    precision,
    together,
)
from lib.distributed.process_group import joined
from lib.errors import TRY_AGAIN, InputError
from lib.report.dry_run import dry_run_lines
from lib.report.predictions import write_split
from lib.report.results import provenance, write_report, write_results
from lib.tracking import run_log as tracking
from lib.tracking import wandb_charts
from lib.tracking.trackers import Trackers, tracker_names
from lib.training import metrics
from lib.training import model as modelling
from lib.training.evaluation import evaluate, predict
from lib.training.meter import Monitor


def main(config: TrainConfig, signals: Signals = SIGNALS) -> dict[str, Any]:
    """The whole run, from the configuration to what all_results.json holds.

    Raises:
        Preempted: it was told to stop by a signal, and can go on from its newest checkpoint.
    """
    with Lock(Path(config.output_dir)) as lock:
        return train(config, signals, lock)


def train(config: TrainConfig, signals: Signals, lock: Lock) -> dict[str, Any]:
    """The same, with a lock on the output folder that is taken when it is written."""
    tracking.quiet_libraries()
    speed = tracking.Speed()
    accelerator, config = start(config)
    agreement = Agreement(signals, accelerator)
    agreement.check()
    accumulation = accelerator.gradient_accumulation_steps
    folder = Path(config.output_dir)

    overwrite = config.overwrite_output_dir and not resume.started_again(folder)
    inputs = once_per_machine(accelerator, lambda: load_inputs(config, overwrite=overwrite))
    if accelerator.is_main_process:
        for line in degraded(config, inputs, accelerator):
            print(line, file=sys.stderr)
    sampler, train_loader, eval_loader = make_loaders(config, inputs, accelerator)
    updates_per_epoch = len(sampler.start(epoch=0))
    collator = make_collator(config, inputs, accelerator, sampler.most_rows)
    num_updates = config.max_train_steps or config.num_train_epochs * updates_per_epoch
    optimizer, schedule = make_optimizer(config, inputs.model, num_updates, accelerator)
    tell_deepspeed(accelerator, max_grad_norm=config.max_grad_norm, most_rows=sampler.most_rows)
    # The schedule is not prepared: Accelerate would step it once per process.
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        inputs.model, optimizer, train_loader, eval_loader
    )
    if config.dry_run:
        lines = dry_run_lines(
            inputs.splits,
            inputs.tokenised,
            sampler.batches,
            train_loader,
            collator,
            model,
            accelerator,
            max_length=config.max_length,
            num_updates=num_updates,
        )
        for line in lines:
            if accelerator.is_main_process:
                print(line)
        return {}

    run = {
        **config.to_dict(),
        "data_fingerprint": inputs.data_fingerprint,
        "mixed_precision": accelerator.mixed_precision,
    }
    # From here on there is a status to leave behind, which the next check does.
    signals.at_once = False
    source = take_up(config, run, lock, accelerator, overwrite=overwrite)
    monitor = Monitor(accelerator, optimizer, partial(explain, sampler, schedule))
    checkpoints = checkpoint.Checkpoints(
        folder,
        run,
        updates_per_epoch=updates_per_epoch,
        keep=config.checkpoints_to_keep or (None if config.checkpointing_steps else 1),
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        monitor=monitor,
        speed=speed,
    )
    state = checkpoint.TrainingState()
    if source is not None:
        state = together(accelerator, lambda: checkpoints.load(source))
        modelling.set_update(schedule, state.update)
        if state.best_update:
            restore(source / checkpoint.BEST_FILE, folder, accelerator, model, inputs.tokenizer)
    trackers = Trackers(accelerator)
    log = tracking.MetricsLog(folder, accelerator, trackers, source=source)
    if accelerator.is_main_process:
        start_trackers(config, trackers, log, inputs, accelerator)
    progress = tracking.Progress(num_updates, state.update, shown=accelerator.is_main_process)
    metric = config.metric_for_best_model or metrics.best_metric_name(inputs.splits.task.metrics)
    patience = config.early_stopping_patience or math.inf

    name_at = partial(
        checkpoint.name_at,
        num_updates=num_updates,
        updates_per_epoch=updates_per_epoch,
        checkpointing_steps=config.checkpointing_steps,
    )

    def catch_up() -> None:
        """Evaluate and save, if that is due after this update and was not done before a restart."""
        update = state.update
        due = update % (config.eval_every or updates_per_epoch) == 0 or update == num_updates
        name = name_at(update)
        if not due and name is None:
            return
        monitor.check()  # nothing is scored or saved after a bad update
        speed.pause()
        if due and state.evaluated < update:
            task = inputs.splits.task
            evaluated = evaluate(model, eval_loader, accelerator, task, agreement.check)
            log.write(update, prefixed("eval", evaluated.scores))
            progress.say(f"epoch {(update - 1) // updates_per_epoch}: {evaluated}")
            if state.is_best(evaluated.scores[metric], lower=metric == "loss"):
                export(folder, accelerator, model, inputs.tokenizer)
        if name is not None:
            checkpoints.save(name, state)
        model.train()
        speed.resume()

    def leave() -> str:
        """Save what is not saved; the words for it."""
        monitor.check()
        speed.pause()
        if state.update > 0:
            checkpoints.save(name_at(state.update) or f"step_{state.update}", state)
        if accelerator.is_main_process:
            output.write_status(folder, "preempted", state.update)
        trackers.call("wandb", lambda run: run.mark_preempting())
        trackers.finish(exit_code=TRY_AGAIN)
        accelerator.state.destroy_process_group()
        kept = f", which {folder} keeps" if state.update > 0 else ""
        again = "run the same command again to go on"
        return f"after update {state.update} of {num_updates}{kept}: {again}"

    agreement.leave = leave
    agreement.check()
    if state.update > 0:
        catch_up()
    model.train()
    speed.resume()
    while state.update < num_updates and state.num_worse < patience:
        epoch, first = divmod(state.update, updates_per_epoch)
        last = min(updates_per_epoch, num_updates - epoch * updates_per_epoch)
        batches = sampler.start(epoch=epoch, first=first, last=last)
        for index, batch in enumerate(train_loader):
            rows = batches[index // accumulation]
            num_rows = sum(map(len, rows))
            with accelerator.accumulate(model):
                set_seed(
                    batching.dropout_seed(
                        config.seed, state.update, index % accumulation, accelerator.process_index
                    )
                )
                labels, _ = batch.pop("labels"), batch.pop("row")
                loss = modelling.loss_sum(model(**batch).logits, labels, config.label_smoothing)
                monitor.add_loss(loss)
                # The loss of an update is the mean over its rows, however they are cut. Accelerate
                # divides by the accumulation and the reduction by the processes: undo both.
                accelerator.backward(loss * (accumulation * accelerator.num_processes / num_rows))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(
                        model.parameters(), config.max_grad_norm or math.inf
                    )
                    monitor.before_update(state.update + 1, num_rows, grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                agreement.check()
                continue

            learning_rate = max(float(rate) for rate in schedule.get_last_lr())
            schedule.step()
            state.update += 1
            num_tokens, num_padded = batching.num_tokens(
                inputs.lengths, rows, collator.padded_length
            )
            monitor.add_tokens(num_tokens, num_padded)
            speed.add(num_rows, num_tokens)
            progress.advance()
            if state.update % config.logging_steps == 0 or state.update == num_updates:
                values = {
                    "epoch": state.update / updates_per_epoch,
                    **monitor.read(),
                    "learning_rate": learning_rate,
                    **speed.read(),
                }
                log.write(state.update, values)
                progress.show(state.update, values)
            agreement.check()
            catch_up()
            if state.num_worse >= patience:
                progress.say(
                    f"stopping early: {state.num_worse} evaluations without a better {metric} than "
                    f"{state.best_score:.4f} at update {state.best_update}"
                )
                break
    progress.close()
    padding = batching.padding_shares(
        inputs.lengths,
        sampler.plan(0),
        max_length=config.max_length,
        padded_length=collator.padded_length,
    )
    results = finish(config, inputs, state, speed, padding, accelerator, agreement, trackers)
    trackers.finish()
    accelerator.end_training()
    return results


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the run starts from: checked rows, the same tokenised, tokenizer and model."""

    splits: data.Splits
    tokenised: data.Splits
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    lengths: list[int]
    data_fingerprint: str


def start(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """The processes of this run, and the configuration with its open choices made.

    The choices are the same for any number of processes.
    """
    accelerator = Accelerator(
        # Batches come cut for the processes; Accelerate only deals them out.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        log_with=tracker_names(config.with_tracking, config.report_to),
        project_dir=config.output_dir,
    )
    check_world(accelerator.num_processes)
    batch_size, accumulation = resolve_batch_sizes(
        config.train_batch_size,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
    )
    accelerator.gradient_accumulation_steps = accumulation
    by_device = config.per_device_train_batch_size is not None
    return accelerator, dataclasses.replace(
        config,
        task_name=config.task_name or ("mrpc" if config.train_file is None else None),
        train_batch_size=batch_size,
        gradient_accumulation_steps=None if by_device else config.gradient_accumulation_steps,
    )


def take_up(
    config: TrainConfig,
    run: dict[str, Any],
    lock: Lock,
    accelerator: Accelerator,
    *,
    overwrite: bool,
) -> Path | None:
    """Make the output folder this run's; the checkpoint to go on from, None for the beginning."""
    folder = Path(config.output_dir)
    find = partial(
        resume.find_checkpoint,
        folder,
        config.resume_from_checkpoint,
        run,
        lock,
        overwrite=overwrite,
    )
    source, update = broadcast_object_list([on_main_process(accelerator, find)])[0]
    claim = partial(
        resume.claim, folder, config.to_dict(), source, update, lock, overwrite=overwrite
    )
    on_main_process(accelerator, claim)
    together(accelerator, partial(resume.check_shared, folder))
    return source


def load_inputs(config: TrainConfig, *, overwrite: bool) -> Inputs:
    """Everything that is read: rows, tokenizer, model; InputError for what cannot be used."""
    if not config.dry_run:
        resume.check_free(Path(config.output_dir), config.to_dict(), overwrite=overwrite)
    if config.train_file is not None:
        names = ("train", "validation", "test")
        files = {name: getattr(config, f"{name}_file") for name in names}
        splits = data.load_files(
            {name: path for name, path in files.items() if path is not None},
            task_name=config.task_name,
            text_columns=config.text_columns,
            label_column=config.label_column,
        )
    else:
        splits = data.load_splits(
            config.task_name or "mrpc", config.dataset_name, revision=config.dataset_revision
        )
    splits = splits.first(
        train=config.max_train_samples,
        validation=config.max_eval_samples,
        test=config.max_predict_samples,
    )
    metric, known = config.metric_for_best_model, metrics.metric_names(splits.task.metrics)
    if metric is not None and metric not in known:
        raise InputError(
            f"--metric_for_best_model must be one of {', '.join(known)}, got {metric!r}"
        )
    tokenizer = modelling.load_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        use_fast=not config.use_slow_tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    model = modelling.load_model(
        config.model_name_or_path,
        revision=config.model_revision,
        label_names=splits.task.labels,
        trust_remote_code=config.trust_remote_code,
        ignore_mismatched_sizes=config.ignore_mismatched_sizes,
        reinit_layers=config.reinit_layers,
        seed=config.seed,
    )
    modelling.check_fit(config.max_length, model, tokenizer)
    tokenised = data.tokenise(splits, tokenizer, max_length=config.max_length)
    return Inputs(
        splits,
        tokenised,
        tokenizer,
        model,
        lengths=data.row_lengths(tokenised.train),
        # What decides the weights and which of them are best.
        data_fingerprint=dataclasses.replace(splits, test={}).fingerprint(),
    )


def make_loaders(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator
) -> tuple[batching.MicroBatches, DataLoader[Any], DataLoader[Any]]:
    """The sampler that decides the order of the rows, its loader, and that of the validation."""
    batch_size = config.train_batch_size
    assert batch_size is not None, "start() fills it in"
    num_micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
    sampler = batching.MicroBatches(
        lambda epoch: batching.global_batches(
            inputs.lengths,
            seed=config.seed,
            epoch=epoch,
            batch_size=batch_size,
            num_micro_batches=num_micro_batches,
            length_grouping=config.length_grouping,
        )
    )
    most_rows = math.ceil(batch_size / num_micro_batches)
    train_loader = DataLoader(
        inputs.tokenised.train,
        batch_sampler=sampler,
        collate_fn=make_collator(config, inputs, accelerator, most_rows),
        num_workers=config.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    validation = inputs.tokenised.validation[inputs.splits.task.validation[0]]
    return sampler, train_loader, make_eval_loader(config, inputs, accelerator, validation)


def make_optimizer(
    config: TrainConfig, model: PreTrainedModel, num_updates: int, accelerator: Accelerator
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW, and the learning rate as a function of the update."""
    groups = modelling.parameter_groups(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        layerwise_lr_decay=config.layerwise_lr_decay,
    )
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda", "mps", "xpu"),
    )
    warmup = num_warmup_updates(config.num_warmup_steps, config.warmup_ratio, num_updates)
    return optimizer, modelling.learning_rate_schedule(
        optimizer, config.lr_scheduler_type, num_warmup_updates=warmup, num_updates=num_updates
    )


def degraded(config: TrainConfig, inputs: Inputs, accelerator: Accelerator) -> list[str]:
    """What this run does less well than it was asked to; a line for each."""
    lines = degradations(accelerator)
    if not inputs.splits.task.labels and config.task_name is None:
        lines.append("the labels have decimals: training for scores (a regression), not classes")
    if config.use_slow_tokenizer and inputs.tokenizer.is_fast:
        lines.append("this model has no slow tokenizer: using the fast one")
    if config.overwrite_output_dir and resume.started_again(Path(config.output_dir)):
        lines.append("started again by the launcher: going on instead of overwriting")
    return lines


def tell_deepspeed(accelerator: Accelerator, *, max_grad_norm: float, most_rows: int) -> None:
    """DeepSpeed clips by itself, and wants to know what it cannot see in these loaders."""
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = max_grad_norm
        settings["train_micro_batch_size_per_gpu"] = most_rows


def make_eval_loader(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator, rows: data.Rows
) -> DataLoader[Any]:
    """A loader of every row of a split, in equally many batches for each process."""
    return DataLoader(
        rows,
        batch_sampler=batching.evaluation_batches(
            data.row_lengths(rows),
            batch_size=config.per_device_eval_batch_size,
            num_processes=accelerator.num_processes,
        ),
        collate_fn=make_collator(config, inputs, accelerator, config.per_device_eval_batch_size),
        pin_memory=accelerator.device.type == "cuda",
    )


def make_collator(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator, most_rows: int
) -> batching.PaddedBatches:
    """The collator of a loader whose batches have `most_rows` rows at the most."""
    compiled = (
        accelerator.distributed_type == DistributedType.XLA
        or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    )
    return batching.collator(
        inputs.tokenizer,
        columns=data.model_columns(inputs.tokenised.train),
        max_length=config.max_length,
        pad_to_max_length=config.pad_to_max_length,
        num_rows=most_rows if compiled else None,
    )


def explain(sampler: batching.MicroBatches, schedule: LambdaLR, update: int) -> str:
    """Where to look when update number `update` (from 1) goes wrong."""
    epoch, index = divmod(update - 1, len(sampler.plan(0)))
    rows = sorted(row for micro_batch in sampler.plan(epoch)[index] for row in micro_batch)
    rate = modelling.learning_rate_at(schedule, update - 1)
    return (
        f"Its learning rate was {rate:.3g}, its training rows (from 0) {rows}: look at them, lower "
        "--learning_rate, or train without fp16"
    )


def prefixed(prefix: str, scores: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in scores.items()}


def finish(
    config: TrainConfig,
    inputs: Inputs,
    state: checkpoint.TrainingState,
    speed: tracking.Speed,
    padding: dict[str, float],
    accelerator: Accelerator,
    agreement: Agreement,
    trackers: Trackers,
) -> dict[str, Any]:
    """Evaluate the saved model, as its users will load it, and write all results."""
    folder = Path(config.output_dir)
    task = inputs.splits.task
    best = AutoModelForSequenceClassification.from_pretrained(folder).to(accelerator.device)
    results: dict[str, Any] = {}
    predicted = {}
    for part, splits in (("eval", inputs.tokenised.validation), ("test", inputs.tokenised.test)):
        # MNLI has two of each: matched and mismatched.
        for prefix, (split, rows) in zip((part, f"{part}_mm"), splits.items(), strict=False):
            loader = accelerator.prepare_data_loader(
                make_eval_loader(config, inputs, accelerator, rows)
            )
            predicted[split] = predict(best, loader, accelerator, agreement.check)
            write = partial(write_split, folder, split, predicted[split], task)
            scores = on_main_process(accelerator, partial(write, seed=config.seed))
            results |= prefixed(prefix, scores or {})
    results |= {
        "best_update": state.best_update,
        "num_updates": state.update,
        **prefixed("train", speed.overall()),
        "seconds_to_first_update": speed.seconds_to_first_update,
    }

    def write_all() -> None:
        facts = facts_of(config, inputs, accelerator)
        split, rows = next(iter(inputs.splits.validation.items()))
        write_results(
            folder,
            results,
            task=task,
            provenance=facts,
            rows=rows,
            lengths=inputs.lengths,
            padding=padding,
        )
        write_report(folder)
        texts = {column: rows[column] for column in task.columns}
        for work in (
            partial(
                wandb_charts.log_predictions,
                predictions=predicted[split],
                texts=texts,
                names=task.labels,
            ),
            partial(wandb_charts.log_results, results=results),
            partial(
                wandb_charts.log_model,
                folder=folder,
                results=results,
                provenance=facts,
                how=config.log_model,
            ),
        ):
            trackers.call("wandb", work)
        output.write_status(folder, "finished", state.update)
        print(f"best model, of update {state.best_update}, and its results: {folder}")
        if config.push_to_hub:
            name = config.hub_model_id or folder.resolve().name
            print(f"to upload it: {shlex.join(['hf', 'upload', name, str(folder)])}")

    on_main_process(accelerator, write_all)
    return results


def facts_of(config: TrainConfig, inputs: Inputs, accelerator: Accelerator) -> dict[str, Any]:
    """Where a run comes from: code, data, model and machine."""
    return provenance(
        data=inputs.splits.source,
        data_fingerprint=inputs.data_fingerprint,
        num_rows={split: len(rows) for split, rows in inputs.splits.all.items()},
        model=config.model_name_or_path,
        model_revision=modelling.revision_of(config.model_name_or_path, config.model_revision),
        num_parameters=sum(weights.numel() for weights in inputs.model.parameters()),
        device=f"{accelerator.num_processes} x {modelling.device_name(accelerator.device)}",
        precision=precision(accelerator),
    )


def start_trackers(
    config: TrainConfig,
    trackers: Trackers,
    log: tracking.MetricsLog,
    inputs: Inputs,
    accelerator: Accelerator,
) -> None:
    """Start what --report_to names, with what a dashboard shall know of the run."""
    folder = Path(config.output_dir)
    trackers.start(
        [str(name) for name in accelerator.log_with],
        config.wandb_project,
        {**config.to_dict(), **facts_of(config, inputs, accelerator)},
        folder=folder,
        metrics=metrics.metric_names(inputs.splits.task.metrics),
        lines=log.lines(),
        earlier=log.earlier,
        wandb_options={
            "entity": config.wandb_entity,
            "name": config.run_name or folder.resolve().name,
            "group": config.run_group,
            "tags": list(config.tags),
            "mode": config.wandb_mode,
        },
    )


def launched() -> None:
    """What Accelerate's launcher for TPUs starts on each core."""
    with exit_status():
        main(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    with exit_status(), joined(CONFIG.peer_timeout):
        main(CONFIG)
