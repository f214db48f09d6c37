"""Fine-tune BERT on GLUE/MRPC with Accelerate, on any number of processes.

    accelerate launch train_mrpc.py                        BERT base on MRPC, from the hub
    accelerate launch train_mrpc.py --demo                 a minute, with nothing to download
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml train_mrpc.py

A run is a function of its configuration: the order of the rows depends on (seed, epoch), the
learning rate on the update, the dropout on (seed, update, micro-batch, rank). A checkpoint holds
only what training computed. An `update` is one optimizer step; its rows, over all processes, are
the global batch; a `micro-batch` is the rows of one forward pass on one process.
"""

import sys

from lib.backends import xla
from lib.distributed.signals import Signals, ignore_stop_signals

SIGNALS = Signals()
ARGUMENTS = sys.argv if __name__ == "__main__" else xla.script_arguments(__file__)
if ARGUMENTS:
    SIGNALS.listen(launcher=ARGUMENTS is not sys.argv)  # first: one may arrive during the imports

from lib.cli import rules, startup
from lib.cli.config import TrainConfig
from lib.finished import finished_lines

if ARGUMENTS:
    CONFIG = startup.start(ARGUMENTS, finished_lines)  # rejects bad flags before slow imports

from functools import partial
from math import ceil, inf
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib.backends import deepspeed, devices, fsdp
from lib.checkpoints.best_model import BestModel
from lib.checkpoints.checkpoint import BEST_FILE, Checkpoints, TrainingState
from lib.checkpoints.run_folder import RunFolder
from lib.data import batching
from lib.data.splits import Splits, load_splits
from lib.data.tokenizing import model_columns, row_lengths
from lib.distributed import collectives
from lib.distributed.out_of_memory import MicroBatchSize, check_repeatable
from lib.distributed.process_group import process_group
from lib.distributed.stop_signal import StopSignal
from lib.errors import Preempted
from lib.hub import download, prefetch, upload
from lib.model import dropout, layers, loading
from lib.report import results
from lib.report.description import announce, describe
from lib.tracking.progress import quiet_libraries
from lib.tracking.run_log import RunLog
from lib.tracking.trackers import tracker_names
from lib.training import metrics, optimization
from lib.training.evaluation import evaluate, evaluation_loaders
from lib.training.meter import Meter
from lib.training.timetable import Timetable


def main(config: TrainConfig, signals: Signals = SIGNALS) -> dict[str, Any]:
    """Train as configured, and return the results; `Preempted` if a signal stops the run."""
    overwrite, resume_from = config.overwrite_output_dir, config.resume_from_checkpoint
    folder = RunFolder(config.output_dir, overwrite=overwrite, resume_from=resume_from)
    push = upload.pushed_when_finished(folder.path, config.push_options())
    with push, folder, process_group(config.peer_timeout):
        return train(rules.resolve_precision(config, folder.earlier_config()), folder, signals)


def train(config: TrainConfig, folder: RunFolder, signals: Signals) -> dict[str, Any]:
    """Train, and score the best model; the folder is locked before the first write."""
    quiet_libraries()
    accelerator = Accelerator(
        # The sampler cuts the batches for the processes; Accelerate only deals them out.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        log_with=tracker_names(config.with_tracking, config.report_to),
        project_dir=config.output_dir,
    )
    collectives.check_world(accelerator.num_processes)
    check_repeatable(config.per_device_train_batch_size, accelerator.state)
    find_commits = partial(download.commits_of, config.to_dict(), folder.earlier_config())
    commits = collectives.from_main_process(accelerator, find_commits)
    config, accumulation = rules.resolve(config, accelerator.num_processes, commits)
    accelerator.gradient_accumulation_steps = accumulation
    stop = StopSignal(signals, accelerator)
    stop.check()

    # Data, model, optimizer. One process loads first, and fills the caches.
    load = partial(load_inputs, config, folder)
    splits, tokenizer, tokenized, model = collectives.main_processes_first(accelerator, load)
    loaders = make_loaders(config, tokenizer, tokenized, accelerator)
    sampler, collator, train_loader, eval_loaders = loaders
    lengths = row_lengths(tokenized.train)
    per_epoch = sampler.per_epoch
    num_updates = config.max_train_steps or config.num_train_epochs * per_epoch
    timetable = Timetable(num_updates, per_epoch, config.eval_every, config.checkpointing_steps)
    optimizer, schedule = make_optimizer(config, model, num_updates, accelerator)
    criterion = optimization.Criterion(splits, config.class_weights, config.label_smoothing)
    provenance = partial(results.provenance, config.to_dict(), splits, model, accelerator)
    origin = collectives.from_main_process(accelerator, provenance)
    deepspeed.configure(accelerator, config.max_grad_norm, sampler.plan)
    fsdp.configure(accelerator, model, layers.encoder_layers)
    dropout.configure(accelerator, model)
    # The schedule is not prepared: Accelerate would step it once per process.
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    eval_loaders = {split: accelerator.prepare(loader) for split, loader in eval_loaders.items()}
    if config.dry_run:
        describe(splits, tokenized, sampler, collator, train_loader, model, accelerator, timetable)
        return prefetch.print_batch_lines(commits) if config.prefetch else {}
    announce(config.to_dict(), origin, splits, tokenized, tokenizer, timetable, accelerator)

    # The output folder, and what an earlier start of this run left in it
    signals.save_first()
    identity = config.to_dict() | {name: origin[name] for name in ("data_fingerprint", "precision")}
    # By default all checkpoints that were asked for, else only the newest.
    keep = config.checkpoints_to_keep or (None if config.checkpointing_steps else 1)
    num_checkpoints, num_parameters = timetable.most_checkpoints(keep), origin["num_parameters"]
    claim = partial(folder.claim, config.to_dict(), identity, num_checkpoints, num_parameters)
    source = collectives.from_main_process(accelerator, claim)
    collectives.on_all_processes(accelerator, folder.check_shared)
    describe_update = partial(optimization.describe_update, sampler.plan, schedule)
    meter = Meter(accelerator, model, optimizer, describe_update, folder.started)
    best = BestModel(folder.path, accelerator, model, tokenizer)
    objects = {"meter": meter, "scaler": accelerator.scaler}
    checkpoints = Checkpoints(
        folder, identity, accelerator, model, optimizer, objects, keep, per_epoch, stop
    )
    state = TrainingState()
    if source is not None:
        state = checkpoints.resume(source)
        optimization.set_learning_rate(schedule, state.update)
        if state.best_update:
            best.restore(source / BEST_FILE)
    log = RunLog(folder.path, accelerator, source, state.update, num_updates)
    log.start_trackers(config.to_dict() | origin, splits.task)

    metric = config.metric_for_best_model or metrics.best_metric_name(splits.task.metrics)
    eval_loader = eval_loaders[splits.task.validation[0]]
    patience = config.early_stopping_patience or inf
    updates = sampler.updates(train_loader, accelerator.num_processes, state.update, num_updates)
    updates = log.profiled(updates, config.profile, meter.speed.pause)
    micro_batch_size = MicroBatchSize(
        accelerator, model, optimizer, sampler, config.per_device_train_batch_size, folder, source
    )
    try:
        model.train()
        while True:
            # First what is due after the update just done, which a resumed run may still owe.
            evaluation = timetable.evaluation_due(state.update) and state.evaluated < state.update
            checkpoint_name = timetable.checkpoint_due(state.update)
            if evaluation or checkpoint_name:
                meter.check()  # nothing is scored or saved after a bad update
                meter.speed.pause()
                if evaluation:
                    evaluated = evaluate(model, eval_loader, accelerator, splits.task, stop.check)
                    is_best = state.record(evaluated.scores[metric], lower=metric == "loss")
                    log.evaluation(state.update, timetable.epochs(state.update), evaluated, is_best)
                    if is_best:
                        best.save()
                if checkpoint_name:
                    checkpoints.save(checkpoint_name, state)
                model.train()
            if state.num_worse >= patience or not (following := next(updates, None)):
                break
            global_batch, micro_batches = following
            meter.start_update()
            total_weight = criterion.total_weight(global_batch)  # the number of rows by default
            logits = loss = None  # a graph that did not fit must not be kept
            for index, batch in enumerate(micro_batches):
                stop.check()
                place = (config.seed, state.update, index, accelerator.process_index)
                set_seed(batching.dropout_seed(*place))
                labels, _ = batch.pop("labels"), batch.pop("row")
                with accelerator.accumulate(model), micro_batch_size.attempt():
                    logits = model(**batch).logits
                    loss = criterion.sum(logits, labels)
                    meter.add_loss(loss)
                    # The loss of an update is the mean over its rows, however they are split.
                    # Accelerate divides by the accumulation and DDP by the processes: undo both.
                    scale = sampler.num_micro_batches / total_weight
                    accelerator.backward(loss * scale)
            if not micro_batch_size.fits():
                continue  # the same update again, on all processes
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or inf)
            meter.guard_update(state.update + 1, total_weight, grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            state.update += 1
            tokens = batching.num_tokens(lengths, global_batch, collator.padded_length)
            meter.count_update(sum(map(len, global_batch)), *tokens)
            log.advance()
            if state.update % config.logging_steps == 0 or state.update == num_updates:
                log.training(state.update, timetable.epochs(state.update), meter.read())
            elif log.progress.is_first(state.update):
                log.progress.first_loss(state.update, meter.loss())
        log.trained()
        if state.num_worse >= patience:
            log.progress.say(f"stopped early: {patience} evaluations without a better {metric}")
        best_model = best.load(trust_remote_code=config.trust_remote_code)
        scores, predicted = results.score_splits(
            folder.path, best_model, eval_loaders, accelerator, splits.task, stop.check, config.seed
        )
        checkpoints.wait()
    except Preempted as preempted:
        meter.check()
        meter.speed.pause()
        if state.update > 0:
            name = timetable.checkpoint_due(state.update) or f"step_{state.update}"
            checkpoints.save(name, state, wait=True)
        if accelerator.is_main_process:
            folder.write_status("preempted", state.update)
        log.preempted()
        when = f"after update {state.update} of {num_updates}: run the same command again to resume"
        raise Preempted(preempted.signal_name, when) from None

    outcome = {**scores, "best_update": state.best_update, "num_updates": state.update}
    outcome |= meter.overall()
    padding = batching.padding_shares(lengths, sampler.plan(0), collator)
    finish = partial(results.finish, folder, log, config.to_dict(), splits, outcome, origin)
    collectives.on_main_process(accelerator, partial(finish, predicted, lengths, padding))
    log.trackers.finish()  # those of other machines
    accelerator.end_training()
    return outcome


def load_inputs(
    config: TrainConfig, folder: RunFolder
) -> tuple[Splits, PreTrainedTokenizerBase, Splits, PreTrainedModel]:
    """Load the rows, the tokenizer, the tokenized rows and the model, and check them all."""
    if not config.dry_run:
        folder.check_available(config.to_dict())
    splits = load_splits(
        config.files() or config.dataset_name,
        revision=config.dataset_revision,
        **config.values("task_name", "text_columns", "label_column", "holdout"),
    ).first(config.max_train_samples, config.max_eval_samples, config.max_predict_samples)
    splits = metrics.with_metric(splits, config.metric_for_best_model)
    source = (config.model_name_or_path, config.model_revision, config.trust_remote_code)
    tokenizer = loading.load_tokenizer(*source, use_fast=not config.use_slow_tokenizer)
    model = loading.load_model(
        *source,
        tokenizer,
        label_names=splits.task.labels,
        **config.values("max_length", "seed", "reinit_layers", "freeze_layers"),
        **config.values("lora_rank", "lora_alpha"),
        **config.values("ignore_mismatched_sizes", "gradient_checkpointing", "attn_implementation"),
    )
    tokenized = splits.tokenized(tokenizer, max_length=config.max_length)
    return splits, tokenizer, tokenized, model


def make_loaders(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Splits,
    accelerator: Accelerator,
) -> tuple[
    batching.MicroBatches, batching.FillingCollator, DataLoader[Any], dict[str, DataLoader[Any]]
]:
    """Create the sampler that orders the training rows, the collator, and the DataLoaders."""
    compiled = devices.compiles_shapes(accelerator)
    pad = DataCollatorWithPadding(
        tokenizer,
        padding="max_length" if config.pad_to_max_length else "longest",
        max_length=config.max_length if config.pad_to_max_length else None,
        pad_to_multiple_of=batching.compiled_multiple(config.max_length) if compiled else None,
    )
    assert config.train_batch_size is not None, "resolve() sets it"
    num_micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
    most_rows = ceil(config.train_batch_size / num_micro_batches) if compiled else None
    columns, max_length = model_columns(tokenized.train), config.max_length
    collator = batching.FillingCollator(pad, columns, max_length, most_rows)
    plan = partial(
        batching.plan_epoch,
        row_lengths(tokenized.train),
        batch_size=config.train_batch_size,
        num_micro_batches=num_micro_batches,
        by_tokens=not (compiled or config.pad_to_max_length or config.per_device_train_batch_size),
        **config.values("seed", "length_grouping"),
    )
    per_epoch = -(-len(tokenized.train) // config.train_batch_size)
    sampler = batching.MicroBatches(plan, per_epoch, num_micro_batches)
    train_loader = DataLoader(
        tokenized.train,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    batch_size = config.per_device_eval_batch_size
    eval_loaders = evaluation_loaders(tokenized, batch_size, collator, accelerator)
    return sampler, collator, train_loader, eval_loaders


def make_optimizer(
    config: TrainConfig, model: PreTrainedModel, num_updates: int, accelerator: Accelerator
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Create AdamW, and the schedule of its learning rate over the updates."""
    optimizer = torch.optim.AdamW(
        optimization.parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=devices.has_fused_adamw(accelerator.device),
    )
    warmup = rules.num_warmup_updates(config.num_warmup_steps, config.warmup_ratio, num_updates)
    kind = config.lr_scheduler_type
    return optimizer, optimization.learning_rate_schedule(optimizer, kind, warmup, num_updates)


def launched() -> None:
    """Entry point of one TPU chip: `main_training_function` in tpu.yaml."""
    with startup.running():
        main(CONFIG)


if __name__ == "__main__":
    with startup.running():
        main(CONFIG)
    ignore_stop_signals()
