"""Flags of run_glue.py, run_glue_no_trainer.py and Trainer, and what each of them is here.

*Source*: `TrainingArguments` of transformers 5.23, the dataclasses of run_glue.py, and the names
that older versions of both had. Flags of the same name and meaning are not listed.
"""

from collections.abc import Mapping
from typing import Any

from lib.cli.flags.declaration import BOOLEAN_WORDS
from lib.errors import InputError

# Other names of our flags.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "dataset_config_name": "task_name",
    "eval_steps": "eval_every",
    "group_by_length": "length_grouping",
    "hub_private_repo": "hub_private",
    "label_smoothing_factor": "label_smoothing",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_steps": "max_train_steps",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "project": "wandb_project",
    "push_to_hub_model_id": "hub_model_id",
    "save_steps": "checkpointing_steps",
    "save_total_limit": "checkpoints_to_keep",
    "warmup_steps": "num_warmup_steps",
}

# Values that have an equal here: our flag and its value, or None where every run does that.
EQUALS: dict[str, dict[str, tuple[str, Any] | None]] = {
    "average_tokens_across_devices": {"true": None},
    "bf16": {"true": ("mixed_precision", "bf16")},
    "dataloader_drop_last": {"false": None},
    "dataloader_in_order": {"true": None},
    "dataloader_pin_memory": {"true": None},
    "do_eval": {"true": None},
    "do_predict": {"true": None},
    "do_train": {"true": None},
    "enable_jit_checkpoint": {"true": None},
    "eval_strategy": {"epoch": ("eval_every", None)},
    "evaluate_during_training": {"true": None},
    "evaluation_strategy": {"epoch": ("eval_every", None)},
    "fp16": {"true": ("mixed_precision", "fp16")},
    "hub_strategy": {"end": None},
    "ignore_data_skip": {"false": None},
    "load_best_model_at_end": {"true": None},
    "logging_nan_inf_filter": {"false": None},
    "logging_strategy": {"steps": None},
    "max_steps": {"-1": ("max_train_steps", None)},
    "optim": {"adamw_torch": None, "adamw_torch_fused": None},
    "overwrite_cache": {"true": None, "false": None},
    "remove_unused_columns": {"true": None},
    "save_on_each_node": {"false": None},
    "save_safetensors": {"true": None},
    "save_strategy": {"epoch": ("checkpointing_steps", "epoch")},
    "skip_memory_metrics": {"true": None, "false": None},
    "train_sampling_strategy": {
        "group_by_length": ("length_grouping", True),
        "random": ("length_grouping", False),
    },
    "use_fast_tokenizer": {
        "true": ("use_slow_tokenizer", False),
        "false": ("use_slow_tokenizer", True),
    },
}

# `steps` as one of these needs the number that the other flag gives.
STRATEGIES = {
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "save_strategy": "save_steps",
}

# `false` is what a run does; what they ask for otherwise is in REMARKS.
OFF = {
    "adafactor",
    "auto_find_batch_size",
    "batch_eval_metrics",
    "bf16",
    "bf16_full_eval",
    "cpu",
    "dataloader_persistent_workers",
    "ddp_find_unused_parameters",
    "disable_tqdm",
    "eval_all_checkpoints",
    "eval_on_start",
    "eval_use_gather_object",
    "fp16",
    "fp16_full_eval",
    "full_determinism",
    "hub_always_push",
    "include_inputs_for_metrics",
    "include_num_input_tokens_seen",
    "include_tokens_per_second",
    "jit_mode_eval",
    "log_on_each_node",
    "logging_first_step",
    "no_cuda",
    "prediction_loss_only",
    "restore_callback_states_from_checkpoint",
    "tf32",
    "torch_compile",
    "use_auth_token",
    "use_cache",
    "use_cpu",
    "use_ipex",
    "use_liger_kernel",
    "use_mps_device",
}

EVALUATES = "a run chooses its best model, so it evaluates every epoch, or every --eval_steps N"
TOKENS = "tokens_per_second is in metrics.jsonl and in the results"
OPTIMIZER = "PyTorch's AdamW is the only optimizer, fused where the device has that"
PRECISION = "give --mixed_precision"
LAUNCH = "Accelerate does this: accelerate launch {} train_mrpc.py"
FILE = LAUNCH.format("--config_file accelerate_configs/{}.yaml")
COMPILE = LAUNCH.format("--dynamo_backend inductor")
DDP = "Accelerate's defaults are used"
GATHER = "each process keeps the logits of its rows, and one gather at the end joins them"
LOADER = "no result depends on it: leave it out, or try --dataloader_num_workers N"
LOGS = "a run prints a few lines from its main process: leave it out"
PUSH = "the upload comes once, after the run has finished"
TOKEN = "set HF_TOKEN in the environment, or log in: hf auth login"
BEFORE = "a flag of accelerate launch: give it before train_mrpc.py"

# Why a flag, or a value that is not in EQUALS, is refused, and what to do instead. Of a flag of
# which every run does the one in EQUALS, it says that.
REMARKS = {
    # What to run
    "do_train": "every run trains",
    "do_eval": EVALUATES,
    "do_predict": "every run predicts the test rows that it has",
    "evaluate_during_training": EVALUATES,
    "eval_all_checkpoints": EVALUATES,
    "eval_strategy": EVALUATES,
    "evaluation_strategy": EVALUATES,
    "eval_delay": EVALUATES,
    "eval_on_start": EVALUATES,
    "prediction_loss_only": "every evaluation computes the task's metrics",
    "load_best_model_at_end": "--output_dir holds the best model; the last is in its checkpoint",
    "greater_is_better": "a lower loss is better, and a higher value of any other metric",
    "early_stopping_threshold": "any better score counts: see --early_stopping_patience",
    # Rows and model
    "overwrite_cache": "tokenized rows are found by their content, so they are never out of date",
    "data_dir": "give --train_file and --validation_file, or a folder as --dataset_name",
    "remove_unused_columns": "the model gets the columns that it takes",
    "label_names": "give --label_column",
    "config_name": "the configuration comes with --model_name_or_path",
    "tokenizer_name": "the tokenizer comes with --model_name_or_path",
    "model_type": "the configuration comes with --model_name_or_path",
    "do_lower_case": "the tokenizer of --model_name_or_path decides",
    "use_fast_tokenizer": "true or false, or --use_slow_tokenizer",
    "cache_dir": "set HF_HOME in the environment",
    "token": TOKEN,
    "use_auth_token": TOKEN,
    # Batches
    "train_sampling_strategy": "group_by_length (the default here) or random, which with "
    "--train_batch_size alone shares tokens as batch_rebalance does",
    "length_column_name": "lengths are counted in tokens, after the truncation",
    "dataloader_drop_last": "every row is used once in each epoch",
    "dataloader_in_order": "the order of the rows is a function of --seed and the epoch",
    "dataloader_pin_memory": "memory is pinned where there is a CUDA device",
    **dict.fromkeys(
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ),
        LOADER,
    ),
    "auto_find_batch_size": "give --per_device_train_batch_size auto, and the rows of an update as "
    "--train_batch_size",
    "data_seed": "--seed decides the order of the rows too",
    "full_determinism": "--seed decides order, dropout and new weights; torch's deterministic "
    "kernels are not asked for",
    # Optimization
    "max_steps": "-1 for none, or a number of updates",
    "lr_scheduler_kwargs": "the schedules of --lr_scheduler_type take no options",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules", "adafactor"), OPTIMIZER),
    "average_tokens_across_devices": "the loss of an update is the mean over its rows, on however "
    "many devices",
    "neftune_noise_alpha": "noise in the embeddings is not supported: leave it out",
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        "--gradient_checkpointing takes no options",
    ),
    "torch_empty_cache_steps": "give --gradient_checkpointing if memory is short",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "Liger's kernels are not supported: leave it out",
    ),
    "use_cache": "a classifier generates no text, and has no cache of keys and values",
    "past_index": "a classifier generates no text, and has no cache of keys and values",
    # Precision, devices and processes: Accelerate's
    **dict.fromkeys(("bf16", "fp16"), "true, or give --mixed_precision"),
    **dict.fromkeys(
        (
            "bf16_full_eval",
            "fp16_full_eval",
            "half_precision_backend",
            "fp16_backend",
            "fp16_opt_level",
        ),
        PRECISION,
    ),
    "tf32": "set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment, which PyTorch reads",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torchdynamo"), COMPILE),
    "torch_compile_mode": LAUNCH.format("--dynamo_backend inductor --dynamo_mode MODE"),
    **dict.fromkeys(
        (
            "fsdp",
            "fsdp_config",
            "fsdp_min_num_params",
            "fsdp_transformer_layer_cls_to_wrap",
            "mp_parameters",
            "parallelism_config",
            "sharded_ddp",
            "use_fsdp",
        ),
        FILE.format("fsdp2"),
    ),
    **dict.fromkeys(
        ("deepspeed", "use_deepspeed", "deepspeed_config_file"), FILE.format("deepspeed_zero2")
    ),
    **dict.fromkeys(("use_cpu", "no_cuda", "cpu"), FILE.format("cpu")),
    "use_mps_device": "Apple's MPS is used where it is the device",
    "tpu_num_cores": FILE.format("tpu"),
    "local_rank": "the launcher says it in LOCAL_RANK: accelerate launch, torchrun or srun",
    **dict.fromkeys(
        (
            "ddp_backend",
            "ddp_broadcast_buffers",
            "ddp_bucket_cap_mb",
            "ddp_find_unused_parameters",
            "ddp_static_graph",
            "xpu_backend",
        ),
        DDP,
    ),
    "ddp_timeout": "a lost process is noticed by its silence: --peer_timeout SECONDS",
    **dict.fromkeys(
        ("accelerator_config", "dispatch_batches", "split_batches"),
        "the batches are cut before Accelerate deals them out: see --train_batch_size",
    ),
    **dict.fromkeys(
        (
            "config_file",
            "dynamo_backend",
            "gpu_ids",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
            "multi_gpu",
            "num_machines",
            "num_processes",
            "zero_stage",
        ),
        BEFORE,
    ),
    **dict.fromkeys(
        ("jit_mode_eval", "server_ip", "server_port", "tpu_metrics_debug", "use_ipex"),
        "not supported: leave it out",
    ),
    # Evaluation
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
        ),
        GATHER,
    ),
    **dict.fromkeys(
        ("include_for_metrics", "include_inputs_for_metrics"),
        "the task decides the metrics; the predictions are in --output_dir",
    ),
    # Checkpoints
    "save_strategy": "steps with --save_steps N, or epoch; the newest checkpoint and the best "
    "model are always kept",
    "save_on_each_node": "one process writes, to a folder that all machines share",
    "save_safetensors": "weights are saved as safetensors",
    "enable_jit_checkpoint": "a run that gets SIGTERM or SIGINT saves a checkpoint",
    "ignore_data_skip": "a resumed run starts at the rows of its next update",
    "restore_callback_states_from_checkpoint": "there are no callbacks",
    # Logs and trackers
    "logging_strategy": "every --logging_steps N updates",
    "logging_first_step": "give --logging_steps 1; the loss of the first update is printed anyway",
    "logging_nan_inf_filter": "a loss that is not finite ends the run, before it is applied",
    "logging_dir": "TensorBoard's files are in --output_dir",
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node"), LOGS),
    "disable_tqdm": "the progress bar is shown on a terminal only: redirect stderr to a file",
    **dict.fromkeys(("include_num_input_tokens_seen", "include_tokens_per_second"), TOKENS),
    "skip_memory_metrics": "the peak of memory is logged with each line",
    "debug": "a loss that is not finite ends the run, with its update and rows",
    "trackio_space_id": "set TRACKIO_SPACE_ID in the environment",
    "trackio_bucket_id": "set TRACKIO_SPACE_ID in the environment: trackio makes its bucket",
    "trackio_static_space_id": "trackio sync --sdk static, once the run has finished",
    "ray_scope": "searches are for wandb: sweep.yaml",
    "project_dir": "all is written to --output_dir",
    # The hub
    **dict.fromkeys(("hub_strategy", "hub_always_push"), PUSH),
    "push_to_hub_organization": "give --hub_model_id ORGANIZATION/NAME",
    "push_to_hub_token": TOKEN,
}

NAMES = ALIASES.keys() | EQUALS.keys() | REMARKS.keys()


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return flags under our names, and a line for each that asks for what every run does.

    Args:
        given: the values of our flags and of those in `NAMES`, as the user wrote them.

    Raises:
        InputError: one has no equal here, or two of them set the same flag.
    """
    flags: dict[str, Any] = {}
    written: dict[str, str] = {}  # what the user called each flag
    remarks = []
    for name, value in given.items():
        if name in STRATEGIES and value == "steps":
            if STRATEGIES[name] not in given:
                raise InputError(f"--{name} steps needs --{STRATEGIES[name]} N")
            continue
        if name in OFF and BOOLEAN_WORDS.get(str(value).lower()) is False:
            continue
        found = _equal(name, value)
        if found is None:
            remarks.append(f"--{name} is not needed: {REMARKS[name]}")
            continue
        ours, value = found
        if ours in written:
            raise InputError(
                f"--{written[ours]} and --{name} both decide --{ours}: leave one of them out"
            )
        flags[ours], written[ours] = value, name
    return flags, remarks


def _equal(name: str, value: Any) -> tuple[str, Any] | None:
    """Our flag and its value, or None if every run does what is asked for."""
    if name not in NAMES:
        if name == "task_name" and isinstance(value, str):
            value = value.lower()  # as run_glue.py does
        if name == "mixed_precision" and value is False:
            value = "no"  # as YAML reads it
        if name == "metric_for_best_model" and isinstance(value, str):
            value = value.removeprefix("eval_")  # as Trainer does
        return name, value
    text = str(value).lower()
    equals = EQUALS.get(name, {})
    for word in (text, str(BOOLEAN_WORDS.get(text)).lower()):
        if word in equals:
            return equals[word]
    if name not in ALIASES:
        # Values may be secret, but for those of the flags in EQUALS.
        raise InputError(f"--{name}{f' {value}' if equals else ''}: {REMARKS[name]}")
    # Below 1, since transformers 5, it is a share of the updates.
    if name == "warmup_steps" and text.lstrip("0").startswith("."):
        return "warmup_ratio", value
    return ALIASES[name], value
