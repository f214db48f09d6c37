"""The rules between flags, and the numbers that several flags make together."""

import dataclasses
import importlib.util
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.backends import deepspeed
from lib.backends.settings import use_precision
from lib.data.files.paths import expand
from lib.errors import InputError

if TYPE_CHECKING:  # it imports this module
    from lib.cli.config import TrainConfig

DEFAULT_TRAIN_BATCH_SIZE = 32


def check_rules(config: "TrainConfig") -> None:
    """Check the flags against each other, and the paths among them.

    Raises:
        InputError: two flags contradict each other, or a path cannot be used.
    """
    _check_files(config)
    _check_folders(config)
    _check_updates(config)
    _check_class_weights(config.class_weights)
    _check_adapters(config)
    if "none" in config.report_to and len(config.report_to) > 1:
        raise InputError(f"--report_to {' '.join(config.report_to)}: none stands alone")
    if len(config.text_columns) > 2:
        raise InputError(
            f"--text_columns takes one or two names, got {len(config.text_columns)}: "
            f"{', '.join(config.text_columns)}"
        )


def _check_files(config: "TrainConfig") -> None:
    names = ("train_file", "validation_file", "test_file")
    files = {name: value for name in names if (value := getattr(config, name)) is not None}
    if list(files) == ["test_file"] and (Path(config.output_dir) / "all_results.json").exists():
        raise InputError(
            "--test_file without --train_file: to predict its rows with the model in "
            f"{config.output_dir}, run: "
            f"{shlex.join(['python', '-m', 'lib.predict', config.output_dir, *files['test_file']])}"
        )
    if files and config.train_file is None:
        given = " and ".join(f"--{name}" for name in files)
        raise InputError(f"{given} without --train_file: give the training rows as a file too")
    _check_holdout(config)
    cut = config.validation_share is not None or config.folds is not None
    if config.train_file is not None and config.validation_file is None and not cut:
        raise InputError(
            "--train_file without --validation_file: a run chooses its best model on validation "
            "rows; give some, or cut them from the training rows with --validation_share 0.1"
        )
    for name, patterns in files.items():
        expand(f"--{name}", patterns)


def _check_holdout(config: "TrainConfig") -> None:
    given = [
        name
        for name in ("validation_file", "validation_share", "folds")
        if getattr(config, name) is not None
    ]
    if len(given) > 1:
        raise InputError(
            f"--{given[0]} and --{given[1]} both say which rows validate: give one of them"
        )
    if (config.folds is None) != (config.fold is None):
        raise InputError(
            "--folds N and --fold I belong together: part I of N validates, I from 0 to N - 1"
        )
    if config.folds is not None and config.fold is not None and config.fold >= config.folds:
        raise InputError(
            f"--fold must lie in [0, {config.folds - 1}], got {config.fold}: --folds "
            f"{config.folds} makes parts that are counted from 0"
        )


def _check_folders(config: "TrainConfig") -> None:
    for name in ("output_dir", "model_name_or_path", "dataset_name"):
        if not getattr(config, name):
            raise InputError(f"--{name} is empty: leave it out for the default")
    asked = config.resume_from_checkpoint
    if asked not in (None, "auto") and not (Path(asked) / "manifest.json").is_file():
        raise InputError(
            f"--resume_from_checkpoint {asked} is not a checkpoint of this script (it has no "
            "manifest.json): give a step_N or epoch_N folder, or auto"
        )
    folder = Path(config.output_dir)
    if folder.is_symlink() and not folder.exists():
        raise InputError(
            f"--output_dir {folder} is a link to {folder.readlink()}, which does not exist: create "
            "that folder, or choose another"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: give a folder")


def _check_updates(config: "TrainConfig") -> None:
    steps = config.checkpointing_steps
    if steps not in (None, "epoch") and not (steps.isdecimal() and int(steps) > 0):
        raise InputError(
            f"--checkpointing_steps must be a number of updates or 'epoch', got {steps!r}"
        )
    if config.lr_scheduler_type == "constant" and config.num_warmup_steps:
        raise InputError(
            "--lr_scheduler_type constant has no warm-up, got --num_warmup_steps "
            f"{config.num_warmup_steps}: use constant_with_warmup"
        )
    if config.per_device_train_batch_size == "auto" and config.gradient_accumulation_steps:
        raise InputError(
            "--per_device_train_batch_size auto decides --gradient_accumulation_steps too, got "
            f"{config.gradient_accumulation_steps}: leave it out"
        )
    if config.max_train_steps is not None:
        num_warmup_updates(config.num_warmup_steps, config.warmup_ratio, config.max_train_steps)


def _check_class_weights(given: Sequence[str]) -> None:
    try:
        positive = bool(given) and all(0 < float(word) < math.inf for word in given)
    except ValueError:
        positive = False
    if not positive and given not in (("balanced",), ("none",)):
        raise InputError(
            "--class_weights must be balanced, none, or a positive number for each class, got "
            f"{' '.join(given) or 'nothing'}"
        )


def _check_adapters(config: "TrainConfig") -> None:
    if config.lora_rank is None:
        if config.lora_alpha is not None:
            raise InputError("--lora_alpha without --lora_rank: it scales the adapters of LoRA")
        return
    if config.freeze_layers is not None or config.reinit_layers:
        other = "--reinit_layers" if config.reinit_layers else "--freeze_layers"
        raise InputError(f"--lora_rank freezes all pretrained layers: leave {other} out")
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"--lora_rank {config.lora_rank} needs the package peft: pip install peft, or leave "
            "the flag out"
        )


def resolve_precision(config: "TrainConfig", before: Mapping[str, Any]) -> "TrainConfig":
    """Ask Accelerate for the precision; decide what `--mixed_precision auto` is.

    What `auto` chose at the beginning of a run is kept, whatever its processors are by now.

    Args:
        before: the configuration of the run that the main process resumes; empty if it begins.

    Raises:
        InputError: the launcher, or an earlier run of this Python process, has another precision.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import parse_flag_from_env

    from lib.backends.devices import fastest_precision
    from lib.distributed import collectives

    wanted = config.mixed_precision
    if wanted == "auto":
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as Accelerator does
        found = collectives.gather(
            state, (before.get("mixed_precision"), fastest_precision(state.device))
        )
        fastest = {precision for _, precision in found}
        wanted = found[0][0] or (fastest.pop() if len(fastest) == 1 else "no")
    use_precision(os.environ, wanted)
    deepspeed.check_settings()  # whose file may name another
    shared = AcceleratorState._shared_state
    if shared and wanted not in (None, AcceleratorState().mixed_precision):
        raise InputError(
            f"--mixed_precision {wanted}: this Python process has trained in another precision, "
            "which Accelerate keeps; start a new process"
        )
    return dataclasses.replace(config, mixed_precision=wanted)


def resolve(
    config: "TrainConfig", num_processes: int, commits: Mapping[str, Any]
) -> tuple["TrainConfig", int]:
    """Return the configuration without open choices, and the accumulation of each process.

    The choices are the same for any number of processes.

    Args:
        commits: those of the model and the data set, as `commits_of` returns them.

    Raises:
        InputError: as `resolve_batch_sizes`.
    """
    per_device = config.per_device_train_batch_size
    batch_size, accumulation = resolve_batch_sizes(
        config.train_batch_size,
        None if isinstance(per_device, str) else per_device,
        config.gradient_accumulation_steps,
        num_processes,
    )
    by_device = config.per_device_train_batch_size is not None
    resolved = dataclasses.replace(
        config,
        **{name: commit for name, commit in commits.items() if commit is not None},
        task_name=config.task_name or ("mrpc" if config.train_file is None else None),
        train_batch_size=batch_size,
        gradient_accumulation_steps=None if by_device else config.gradient_accumulation_steps,
    )
    return resolved, accumulation


def num_warmup_updates(num_warmup_steps: int | None, warmup_ratio: float, num_updates: int) -> int:
    """Updates over which the learning rate rises: the count if given, else the ratio, rounded up.

    Raises:
        InputError: the count exceeds the updates of the run.
    """
    if num_warmup_steps is None:
        return math.ceil(warmup_ratio * num_updates)
    if num_warmup_steps > num_updates:
        raise InputError(
            f"--num_warmup_steps {num_warmup_steps} is more than the {num_updates} updates of this "
            "run: the learning rate would never reach its peak"
        )
    return num_warmup_steps


def resolve_batch_sizes(
    train_batch_size: int | None,
    per_device: int | None,
    accumulation: int | None,
    num_processes: int,
) -> tuple[int, int]:
    """Return the rows of a global batch, and the micro-batches a process accumulates for it.

    Args: the three flags as given (None: not given), and the number of processes.

    Raises:
        InputError: the flags contradict each other; the message shows the arithmetic.
    """
    if train_batch_size is None and per_device is not None:
        accumulation = accumulation or 1
        return per_device * accumulation * num_processes, accumulation
    rows = train_batch_size or DEFAULT_TRAIN_BATCH_SIZE
    if per_device is None:
        accumulation = accumulation or 1
        if rows < accumulation * num_processes:
            raise InputError(
                f"--train_batch_size {rows} is less than {num_processes} processes x "
                f"{accumulation} accumulated micro-batches = {accumulation * num_processes}: some "
                "would get no row; use a larger batch or fewer processes"
            )
        return rows, accumulation
    needed = -(-rows // (per_device * num_processes))
    if accumulation is not None and accumulation != needed:
        product = per_device * accumulation * num_processes
        raise InputError(
            f"--train_batch_size {rows} contradicts --per_device_train_batch_size {per_device} x "
            f"--gradient_accumulation_steps {accumulation} x {num_processes} processes = {product}:"
            f" {rows} rows need {needed} accumulated; leave one of the three out"
        )
    return rows, needed
