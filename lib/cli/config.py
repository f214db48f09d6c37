"""The configuration of a run: every flag, declared once, and the rules between flags."""

import dataclasses
import functools
from typing import Any

from lib.cli.flags import at_least, between, checked, flag, flags_of
from lib.cli.rules import check_rules
from lib.data.tasks import TASKS

# The trackers that Accelerate supports.
TRACKERS = (
    "wandb",
    "tensorboard",
    "trackio",
    "comet_ml",
    "clearml",
    "mlflow",
    "aim",
    "dvclive",
    "swanlab",
)

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)

# One declaration function for each group of `--help`.
_data, _model, _training, _evaluation, _output, _tracking, _hub = (
    functools.partial(flag, group)
    for group in ("data", "model", "training", "evaluation", "output", "tracking", "hub")
)


@dataclasses.dataclass(frozen=True, init=False)
class TrainConfig:
    """The configuration of a run; keyword arguments replace defaults.

    With `demo=True` the defaults are those of the built-in corpus and model.

    Raises:
        InputError: a value breaks a rule of its flag, or two flags contradict each other.
    """

    # ------------------------------------------------------------------------------ data
    demo: bool = _data(False, "Use the built-in corpus and tiny model: nothing to download.")
    task_name: str | None = _data(
        None, "GLUE task. Default: mrpc, unless you give files.", choices=tuple(TASKS)
    )
    dataset_name: str = _data(
        "nyu-mll/glue",
        "Dataset on the hub, or a folder of Parquet files (train.parquet, ...) or a DatasetDict.",
        metavar="NAME_OR_DIR",
        is_path=True,
        resume="free",
    )
    dataset_revision: str | None = _data(
        None, "Branch, tag or commit of the dataset on the hub.", resume="free"
    )
    train_file: str | None = _data(
        None,
        "Training rows: CSV, TSV, JSON Lines, JSON or Parquet.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    validation_file: str | None = _data(
        None,
        "Validation rows, on which the best model is chosen.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    test_file: str | None = _data(
        None,
        "Rows to predict; labels are scored, but never used to choose.",
        metavar="FILE",
        is_path=True,
        resume="free",
    )
    text_columns: tuple[str, ...] = _data(
        (),
        "One or two text columns. Default: those of the task (sentence1 sentence2).",
        metavar="COLUMN",
    )
    label_column: str = _data(
        "label",
        "Label column: integers or names for classes, decimals for scores.",
        metavar="COLUMN",
    )
    max_length: int = _data(
        128,
        "Truncate rows to this many tokens.",
        rule=at_least(4, "it counts tokens, special ones included"),
    )
    pad_to_max_length: bool = _data(
        False, "Pad to --max_length instead of the longest row of the micro-batch."
    )
    max_train_samples: int | None = _data(
        None, "Use only the first N training rows.", rule=at_least(1, "it counts rows")
    )
    max_eval_samples: int | None = _data(
        None, "Use only the first N validation rows.", rule=at_least(1, "it counts rows")
    )
    max_predict_samples: int | None = _data(
        None, "Use only the first N test rows.", rule=at_least(1, "it counts rows"), resume="free"
    )
    dataloader_num_workers: int = _data(
        0,
        "Worker processes that make batches, per training process.",
        rule=at_least(0, "0 makes batches in the training process"),
        resume="free",
    )

    # ----------------------------------------------------------------------------- model
    model_name_or_path: str = _model(
        "google-bert/bert-base-uncased",
        "Model on the hub, or a folder.",
        metavar="NAME_OR_DIR",
        is_path=True,
    )
    model_revision: str | None = _model(None, "Branch, tag or commit of the model on the hub.")
    use_slow_tokenizer: bool = _model(
        False, "Use the tokenizer written in Python, where the model has one."
    )
    trust_remote_code: bool = _model(
        False, "Execute code that comes with the model. Off unless you ask for it."
    )
    ignore_mismatched_sizes: bool = _model(
        False, "Replace a classifier that has another number of labels by a new one."
    )
    reinit_layers: int = _model(
        0,
        "Start the top N encoder layers, and the pooler, from random weights.",
        rule=at_least(0, "it counts encoder layers from the top"),
    )

    # -------------------------------------------------------------------------- training
    num_train_epochs: int = _training(
        5,
        "Passes over the training rows.",
        rule=at_least(1, "it counts passes over the training rows"),
        resume="longer",
    )
    max_train_steps: int | None = _training(
        None,
        "Updates in all; overrides --num_train_epochs.",
        rule=at_least(1, "it counts updates"),
        resume="longer",
    )
    learning_rate: float = _training(
        1e-4, "Peak learning rate of AdamW.", rule=between(0, 1, "a usual value for BERT is 5e-5")
    )
    train_batch_size: int | None = _training(
        None,
        "Rows of one update, over all processes. Default: 32, or the next two make it.",
        rule=at_least(1, "it counts the rows of one update over all processes"),
    )
    per_device_train_batch_size: int | None = _training(
        None,
        "Most rows of one forward pass. Alone: an update has this x accumulation x processes rows.",
        rule=at_least(1, "it counts the rows of one forward pass"),
        resume="free",
    )
    gradient_accumulation_steps: int | None = _training(
        None,
        "Forward passes per process and update. Default: as few as fit.",
        rule=at_least(1, "1 does not accumulate"),
        resume="free",
    )
    gradient_checkpointing: bool = _training(
        False,
        "Recompute activations in the backward pass: less memory, slower, the same bits.",
        resume="free",
    )
    length_grouping: bool = _training(
        True, "Form batches of rows of similar length, which saves padding."
    )
    lr_scheduler_type: str = _training(
        "linear", "Shape of the learning rate schedule.", choices=SCHEDULES
    )
    warmup_ratio: float = _training(
        0.1,
        "Share of the updates over which the learning rate rises from 0.",
        rule=between(0, 1, "it is a fraction of the updates; for a count use --num_warmup_steps"),
    )
    num_warmup_steps: int | None = _training(
        None,
        "The same as a number of updates; overrides --warmup_ratio.",
        rule=at_least(0, "it counts updates"),
    )
    weight_decay: float = _training(
        0.01,
        "Decoupled weight decay; not applied to biases and normalization weights.",
        rule=between(0, 1, "a usual value is 0.01"),
    )
    adam_beta1: float = _training(
        0.9,
        "AdamW's decay of the mean gradient.",
        rule=between(0, 0.999999, "a usual value is 0.9"),
    )
    adam_beta2: float = _training(
        0.999,
        "AdamW's decay of the mean squared gradient.",
        rule=between(0, 0.999999, "a usual value is 0.999"),
    )
    adam_epsilon: float = _training(
        1e-8, "AdamW's term for numerical stability.", rule=between(0, 1, "a usual value is 1e-8")
    )
    max_grad_norm: float = _training(
        1.0, "Clip the gradient to this norm; 0 does not clip.", rule=at_least(0, "0 does not clip")
    )
    layerwise_lr_decay: float = _training(
        1.0,
        "Learning rate of a layer relative to the layer above; 1 is the same for all.",
        rule=between(0.01, 1, "1 gives all layers the same learning rate"),
    )
    label_smoothing: float = _training(
        0.0,
        "Share of the target's probability spread over all classes.",
        rule=between(0, 0.999999, "a usual value is 0.1"),
    )
    seed: int = _training(
        42,
        "Decides the order of rows, dropout and new weights.",
        rule=between(0, 2**32 - 1, "it also seeds NumPy's generators"),
    )

    # ------------------------------------------------------------------------ evaluation
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

    # ---------------------------------------------------------------------------- output
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

    # -------------------------------------------------------------------------- tracking
    with_tracking: bool = _tracking(False, "Log to all trackers that are installed.", resume="free")
    report_to: tuple[str, ...] = _tracking(
        (),
        f"Trackers to log to: all, none, or some of {', '.join(TRACKERS)}.",
        choices=(*TRACKERS, "all", "none"),
        metavar="TRACKER",
        resume="free",
    )
    wandb_project: str = _tracking(
        "train_mrpc", "Project on wandb and in the other trackers.", resume="free"
    )
    wandb_entity: str | None = _tracking(
        None, "User or team on wandb. Default: that of the API key.", resume="free"
    )
    wandb_mode: str | None = _tracking(
        None,
        "Default: WANDB_MODE, else online where there are a key and a server.",
        choices=("online", "offline", "disabled"),
        resume="free",
    )
    run_name: str | None = _tracking(
        None, "Name of the run. Default: the name of --output_dir.", resume="free"
    )
    run_group: str | None = _tracking(
        None, "Group of the run on wandb, such as the seeds of one recipe.", resume="free"
    )
    tags: tuple[str, ...] = _tracking((), "Tags of the run on wandb.", metavar="TAG", resume="free")
    log_model: str = _tracking(
        "reference",
        "The best model as a wandb artifact: its path, its files, or not at all.",
        choices=("reference", "file", "none"),
        metavar="reference|file|none",
        resume="free",
    )

    # ------------------------------------------------------------------------------- hub
    push_to_hub: bool = _hub(
        False, "Print the command that uploads the finished folder.", resume="free"
    )
    hub_model_id: str | None = _hub(
        None,
        "Repository on the hub. Default: the name of --output_dir.",
        metavar="USER/NAME",
        resume="free",
    )
    hub_token: str | None = _hub(
        None,
        "Token for the hub; better set HF_TOKEN. Stored nowhere.",
        metavar="TOKEN",
        resume="free",
        saved=False,
    )

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - FLAGS.keys()
        if unknown:
            raise TypeError(f"TrainConfig has no field {', '.join(sorted(unknown))}")
        if given.get("demo"):
            from lib.demo.corpus import DEFAULTS

            given = {**DEFAULTS, **given}
        for name, declared in FLAGS.items():
            value = checked(name, given.get(name, declared.default), declared)
            object.__setattr__(self, name, value)
        check_rules(self)

    def files(self) -> dict[str, str]:
        """The files that were given, by split: train, validation, test."""
        paths = {name: getattr(self, f"{name}_file") for name in ("train", "validation", "test")}
        return {name: path for name, path in paths.items() if path is not None}

    def to_dict(self) -> dict[str, Any]:
        """The flags that config.yaml keeps, as YAML takes them; no secrets."""
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if FLAGS[name].saved
        }


FLAGS = flags_of(TrainConfig)
