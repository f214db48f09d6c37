"""The flags of evaluations and of what a run writes."""

import dataclasses
import functools

from lib.cli.flags.declaration import at_least, flag

_evaluation = functools.partial(flag, "evaluation")

_output = functools.partial(flag, "output")


@dataclasses.dataclass(frozen=True, init=False)
class EvaluationFlags:
    """When and how the model is evaluated."""

    eval_every: int | None = _evaluation(
        None,
        "Evaluate every N updates and at the end. Default: after each epoch.",
        rule=at_least(1, "it counts updates"),
    )
    per_device_eval_batch_size: int = _evaluation(
        32,
        "Rows of one forward pass when evaluating.",
        rule=at_least(1, "it counts the rows of one forward pass"),
        resume="free",
    )
    metric_for_best_model: str | None = _evaluation(
        None,
        "Metric that chooses the best model, or loss. Default: GLUE's own for the task.",
        metavar="METRIC",
    )
    early_stopping_patience: int | None = _evaluation(
        None,
        "Stop after N evaluations in a row without a better score.",
        rule=at_least(1, "it counts evaluations"),
    )


@dataclasses.dataclass(frozen=True, init=False)
class OutputFlags:
    """What a run writes, and resumes from."""

    output_dir: str = _output(
        "outputs/mrpc",
        "Folder for the best model and all results.",
        metavar="DIR",
        is_path=True,
        resume="free",
    )
    overwrite_output_dir: bool = _output(
        False,
        "Replace the run in --output_dir; touches only files that this script wrote.",
        saved=False,
    )
    checkpointing_steps: str | None = _output(
        None,
        "Save a checkpoint every N updates, or after each epoch. Default: epoch.",
        metavar="N|epoch",
        resume="free",
    )
    checkpoints_to_keep: int | None = _output(
        None,
        "Newest checkpoints to keep, and the best. Default: 1, or all with --checkpointing_steps.",
        rule=at_least(1, "the newest is always kept"),
        resume="free",
    )
    save_only_model: bool = _output(
        False,
        "Remove the checkpoints when the run is finished; it then cannot be continued.",
        resume="free",
    )
    resume_from_checkpoint: str | None = _output(
        None,
        "Checkpoint folder to resume from, or auto: the newest good one of --output_dir (default).",
        metavar="DIR|auto",
        is_path=True,
        saved=False,
    )
    logging_steps: int = _output(
        10,
        "Updates between lines in metrics.jsonl.",
        rule=at_least(1, "it counts updates"),
        resume="free",
    )
    profile: int | None = _output(
        None,
        "Trace N updates after the first 10 of this start, and write profile/; slower, same bits.",
        rule=at_least(1, "it counts updates"),
        resume="free",
        saved=False,
    )
    peer_timeout: float = _output(
        120.0,
        "Seconds of silence after which another process counts as lost.",
        rule=at_least(5, "processes send a heartbeat every second"),
        resume="free",
    )
    dry_run: bool = _output(
        False, "Describe the run, do one forward and backward pass, and write nothing.", saved=False
    )
    config: str | None = _output(
        None,
        "YAML file of these flags; flags on the command line win.",
        metavar="FILE",
        is_path=True,
        saved=False,
    )
