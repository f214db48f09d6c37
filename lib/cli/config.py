"""The configuration: one flat, frozen dataclass, read from flags and checked before anything else.

Nothing heavy is imported here, so that `--help` and a wrong flag are answered at once.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.data.tasks import TASKS
from lib.errors import InputError

DEFAULT_TRAIN_BATCH_SIZE = 32


# What Accelerate can log to.
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


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a BERT on GLUE/MRPC, on another GLUE task, or on sentence pairs of your own.

    With no flags: BERT base on MRPC, both from the Hugging Face hub. `--demo` takes a minute and
    needs no network. `--dry_run` shows what a run would do. Flags are written with underscores or
    hyphens; `--config FILE.yaml` gives them from a file.
    """

    # ------------------------------------------------------------------------------ data
    demo: bool = False
    """Use the built-in corpus and tiny model: no download, no account. Other flags still win."""
    task_name: str | None = None
    """GLUE task: cola mnli mrpc qnli qqp rte sst2 stsb wnli. Default mrpc, without files."""
    dataset_name: str = "nyu-mll/glue"
    """Dataset on the hub, or a folder of Parquet files (train.parquet, ...) or a DatasetDict."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the dataset on the hub."""
    train_file: str | None = None
    """CSV, TSV, JSON Lines, JSON or Parquet file with the training rows."""
    validation_file: str | None = None
    """The same for the rows that the run is evaluated on, and its best model chosen by."""
    test_file: str | None = None
    """The same for rows to predict. Labels there are scored, but never used to choose."""
    text_columns: tuple[str, ...] = ()
    """Names of one or two text columns. Default: the task's own (sentence1 sentence2)."""
    label_column: str = "label"
    """Name of the label column: integers or strings for classes, decimals for a score."""
    max_length: int = 128
    """Longest row in tokens; what is longer is truncated."""
    pad_to_max_length: bool = False
    """Pad every row to --max_length instead of the longest of its micro-batch."""
    max_train_samples: int | None = None
    """Use only the first N training rows."""
    max_eval_samples: int | None = None
    """Use only the first N validation rows."""
    max_predict_samples: int | None = None
    """Use only the first N test rows."""
    dataloader_num_workers: int = 0
    """Processes that make batches beside each training process; 0 makes them in place."""

    # ----------------------------------------------------------------------------- model
    model_name_or_path: str = "google-bert/bert-base-uncased"
    """A model on the hub, or a local folder."""
    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    use_slow_tokenizer: bool = False
    """Use the tokenizer that is written in Python, where the model still has one."""
    trust_remote_code: bool = False
    """Let a model on the hub bring code of its own, and execute it. Off unless you ask for it."""
    ignore_mismatched_sizes: bool = False
    """Replace a classifier that has another number of labels by a new one."""

    # -------------------------------------------------------------------------- training
    train_batch_size: int | None = None
    """Rows of one update, over all processes. Default 32, or what the next two make."""
    per_device_train_batch_size: int | None = None
    """Most rows of one forward pass. Alone: rows of an update = this x accumulation x processes."""
    gradient_accumulation_steps: int | None = None
    """Forward passes of each process for one update. Default: as few as fit."""
    per_device_eval_batch_size: int = 32
    """Rows of one forward pass on one process when evaluating."""
    length_grouping: bool = True
    """Form batches of rows of similar length, which saves padding. Off: plain shuffling."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; not applied to biases and normalisation weights."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of the gradient."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean of the squared gradient."""
    adam_epsilon: float = 1e-8
    """AdamW's term for numerical stability."""
    max_grad_norm: float = 1.0
    """Clip the norm of the gradient to this; 0 does not clip."""
    num_train_epochs: int = 5
    """Passes over the training rows."""
    max_train_steps: int | None = None
    """Number of updates in all; overrides --num_train_epochs."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup."""
    num_warmup_steps: int | None = None
    """Updates over which the learning rate rises from 0; overrides --warmup_ratio."""
    warmup_ratio: float = 0.1
    """The same as a fraction of all updates."""
    layerwise_lr_decay: float = 1.0
    """Learning rate of a layer relative to that of the layer above it; 1 is the same for all."""
    reinit_layers: int = 0
    """Start this many of the top encoder layers, and the pooler, from random weights."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all classes."""
    seed: int = 42
    """Decides the order of rows, the dropout and the new weights."""

    # ------------------------------------------------------------------------ evaluation
    eval_every: int | None = None
    """Evaluate every N updates, and at the end. Default: after each epoch."""
    metric_for_best_model: str | None = None
    """Metric that chooses the best model, or loss. Default: GLUE's, the mean of the task's own."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better score."""

    # ---------------------------------------------------------------------------- output
    output_dir: str = "outputs/mrpc"
    """Folder for the best model and all results."""
    overwrite_output_dir: bool = False
    """Start anew in a folder that holds another run; replaces only files that this script wrote."""
    checkpointing_steps: str | None = None
    """Save a checkpoint every N updates (a number) or after each epoch (epoch). Default: epoch."""
    checkpoints_to_keep: int | None = None
    """Newest checkpoints to keep, besides the best. Default: all, or 1 without the last flag."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to go on from, or auto: the newest good one of --output_dir (default)."""
    logging_steps: int = 10
    """Updates from one line in metrics.jsonl (and in a log file) to the next."""
    peer_timeout: float = 120.0
    """Seconds of silence after which another process of the run counts as lost."""
    dry_run: bool = False
    """Print what the run would do, do one forward and backward pass, and write nothing."""
    config: str | None = None
    """A YAML file of these fields; flags on the command line win over it."""

    # -------------------------------------------------------------------- trackers and hub
    with_tracking: bool = False
    """Log to the trackers of --report_to as well."""
    report_to: tuple[str, ...] = ()
    """Trackers: wandb, tensorboard, trackio, ..., all or none. Naming one turns tracking on."""
    wandb_project: str = "train_mrpc"
    """Project on wandb, or of the other trackers."""
    wandb_entity: str | None = None
    """User or team on wandb. Default: the key's own."""
    wandb_mode: str | None = None
    """online, offline or disabled. Default: WANDB_MODE, else online with a key and a server."""
    run_name: str | None = None
    """Name of the run in the trackers. Default: the name of --output_dir."""
    run_group: str | None = None
    """Group of the run on wandb, such as the seeds of one recipe."""
    tags: tuple[str, ...] = ()
    """Tags of the run on wandb."""
    log_model: str = "reference"
    """The best model as an artifact on wandb: reference (its path), file (uploaded) or none."""
    push_to_hub: bool = False
    """Print the command that uploads the finished folder to the hub."""
    hub_model_id: str | None = None
    """Repository on the hub. Default: the name of --output_dir."""
    hub_token: str | None = dataclasses.field(default=None, repr=False)
    """Token for the hub; better given as HF_TOKEN in the environment. Written nowhere."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field.name, getattr(self, field.name))
        for name, (low, high, remedy) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not low <= value <= high:
                rule = f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be at least {low:g}"
                raise InputError(f"--{name} must {rule}, got {value:g}: {remedy}")
        self._check_choices()
        self._check_files()
        self._check_steps()

    def _check_choices(self) -> None:
        if self.task_name is not None:
            _check_choice("task_name", self.task_name, tuple(TASKS))
        _check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        _check_choice("log_model", self.log_model, ("reference", "file", "none"))
        if self.wandb_mode is not None:
            _check_choice("wandb_mode", self.wandb_mode, ("online", "offline", "disabled"))
        for name in self.report_to:
            _check_choice("report_to", name, (*TRACKERS, "all", "none"))
        if "none" in self.report_to and len(self.report_to) > 1:
            raise InputError(f"--report_to {' '.join(self.report_to)}: none stands alone")
        if len(self.text_columns) > 2:
            raise InputError(
                f"--text_columns takes one or two names, got {len(self.text_columns)}: "
                f"{', '.join(self.text_columns)}"
            )

    def _check_files(self) -> None:
        files = {
            name: value
            for name in ("train_file", "validation_file", "test_file")
            if (value := getattr(self, name)) is not None
        }
        if files and self.train_file is None:
            given = " and ".join(f"--{name}" for name in files)
            raise InputError(f"{given} without --train_file: give the training rows as a file too")
        if self.train_file is not None and self.validation_file is None:
            raise InputError(
                "--train_file without --validation_file: a run chooses its best model on a "
                "validation split; give one, cut from the training rows if need be"
            )
        for name, value in files.items():
            _check_file(f"--{name}", value)
        for name in ("output_dir", "model_name_or_path", "dataset_name"):
            if not getattr(self, name):
                raise InputError(f"--{name} is empty: leave it out for the default")
        asked = self.resume_from_checkpoint
        if asked not in (None, "auto") and not (Path(asked) / "manifest.json").is_file():
            raise InputError(
                f"--resume_from_checkpoint {asked} is no checkpoint of this script (no "
                "manifest.json): give a step_N or epoch_N folder, or auto"
            )
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise InputError(f"--output_dir {self.output_dir} is a file: give a folder")

    def _check_steps(self) -> None:
        if self.checkpointing_steps is not None and self.checkpointing_steps != "epoch":
            number = self.checkpointing_steps
            if not number.isdecimal() or int(number) < 1:
                raise InputError(
                    f"--checkpointing_steps must be a number of updates or 'epoch', got {number!r}"
                )
        if self.lr_scheduler_type == "constant" and self.num_warmup_steps:
            raise InputError(
                f"--lr_scheduler_type constant has no warm-up, got --num_warmup_steps "
                f"{self.num_warmup_steps}: use constant_with_warmup"
            )
        if (
            self.max_train_steps is not None
            and self.num_warmup_steps is not None
            and self.num_warmup_steps > self.max_train_steps
        ):
            raise InputError(
                f"--num_warmup_steps {self.num_warmup_steps} is more than --max_train_steps "
                f"{self.max_train_steps}: the learning rate would never reach its peak"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields that define the run, as YAML takes them; without secrets and --config."""
        left_out = (
            "config",
            "hub_token",
            "dry_run",
            "overwrite_output_dir",
            "resume_from_checkpoint",
        )
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in left_out
        }


# field: (lowest, highest, what the user may have meant)
RANGES: dict[str, tuple[float, float, str]] = {
    "max_length": (4, math.inf, "it counts tokens, with the special ones"),
    "max_train_samples": (1, math.inf, "it counts rows"),
    "max_eval_samples": (1, math.inf, "it counts rows"),
    "max_predict_samples": (1, math.inf, "it counts rows"),
    "dataloader_num_workers": (0, math.inf, "0 makes the batches in the training process"),
    "train_batch_size": (1, math.inf, "it counts the rows of one update over all processes"),
    "per_device_train_batch_size": (1, math.inf, "it counts the rows of one forward pass"),
    "gradient_accumulation_steps": (1, math.inf, "1 does not accumulate"),
    "per_device_eval_batch_size": (1, math.inf, "it counts the rows of one forward pass"),
    "learning_rate": (0, 1, "a usual value for BERT is 5e-5"),
    "weight_decay": (0, 1, "a usual value is 0.01"),
    "adam_beta1": (0, 0.999999, "a usual value is 0.9"),
    "adam_beta2": (0, 0.999999, "a usual value is 0.999"),
    "adam_epsilon": (0, 1, "a usual value is 1e-8"),
    "max_grad_norm": (0, math.inf, "0 does not clip"),
    "num_train_epochs": (1, math.inf, "it counts passes over the training rows"),
    "max_train_steps": (1, math.inf, "it counts updates"),
    "num_warmup_steps": (0, math.inf, "it counts updates"),
    "warmup_ratio": (
        0,
        1,
        "it is a fraction of the updates; for a count use --num_warmup_steps",
    ),
    "layerwise_lr_decay": (0.01, 1, "1 gives all layers the same learning rate"),
    "reinit_layers": (0, math.inf, "it counts encoder layers from the top"),
    "label_smoothing": (0, 0.999999, "a usual value is 0.1"),
    "seed": (0, 2**32 - 1, "it seeds NumPy's generators too"),
    "eval_every": (1, math.inf, "it counts updates"),
    "early_stopping_patience": (1, math.inf, "it counts evaluations"),
    "checkpoints_to_keep": (1, math.inf, "the newest is always kept"),
    "logging_steps": (1, math.inf, "it counts updates"),
    "peer_timeout": (5, math.inf, "processes say once a second that they live"),
}

# Fields that do not decide what a run computes. Rows are known by their content, wherever they lie.
FREE_TO_CHANGE = {
    "train_file",
    "validation_file",
    "test_file",
    "max_predict_samples",
    "dataset_name",
    "dataset_revision",
    "dataloader_num_workers",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "output_dir",
    "checkpointing_steps",
    "checkpoints_to_keep",
    "logging_steps",
    "peer_timeout",
    "with_tracking",
    "report_to",
    "wandb_project",
    "wandb_entity",
    "wandb_mode",
    "run_name",
    "run_group",
    "tags",
    "log_model",
    "push_to_hub",
    "hub_model_id",
}

# Fields that may grow: the run then goes on for longer.
MAY_GROW = {"num_train_epochs", "max_train_steps"}

FILE_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def resolve_batch_sizes(
    train_batch_size: int | None,
    per_device: int | None,
    accumulation: int | None,
    num_processes: int,
) -> tuple[int, int]:
    """The global batch in rows, and the micro-batches each process accumulates for it.

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
                f"{accumulation} accumulated micro-batches = {accumulation * num_processes}: "
                "some would get no row; use a larger batch or fewer processes"
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


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """See that a run with the configuration `now` may go on where one with `before` stopped.

    Args:
        where: the folder or checkpoint that `before` comes from.

    Raises:
        InputError: they differ in what decides the result; the message shows each difference.
    """
    differences = [
        f"{name} {before[name]!r} there, {value!r} here"
        for name, value in now.items()
        if name in before
        and name not in FREE_TO_CHANGE
        and before[name] != value
        and not (name in MAY_GROW and before[name] and value and value > before[name])
    ]
    if differences:
        raise InputError(
            f"{where} is of another run: {'; '.join(differences)}. Give the same values, another "
            "--output_dir, or --overwrite_output_dir to replace that run"
        )


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)


def check_type(name: str, value: object) -> None:
    """See that a field has a value of its type; a whole number will do for a decimal one.

    Raises:
        InputError: it has not. YAML brings values of any type.
    """
    expected = TYPES[name]
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    good = isinstance(value, plain) or (float in plain and isinstance(value, int))
    if isinstance(value, bool) and bool not in plain:
        good = False
    if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
        good = False
    if isinstance(value, float) and not math.isfinite(value):
        good = False
    if not good:
        words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true/false"}
        names = [
            words.get(kind.__name__, "a list of text") for kind in plain if kind is not type(None)
        ]
        raise InputError(f"--{name} takes {' or '.join(names)}, got {value!r}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(
            f"--{name} must be one of {', '.join(choices)}, got {value!r}{_nearest(value, choices)}"
        )


def _check_file(flag: str, value: str) -> None:
    path = Path(value)
    if path.suffix.lower() not in FILE_ENDINGS:
        raise InputError(
            f"{flag} {value}: its ending does not tell its format; known: {', '.join(FILE_ENDINGS)}"
        )
    if path.is_dir():
        raise InputError(f"{flag} {value} is a folder: give a file, or --dataset_name for a folder")
    if not path.is_file():
        raise InputError(f"{flag} {value}: no such file (looked in {path.absolute().parent})")
    if path.stat().st_size == 0:
        raise InputError(f"{flag} {value} is empty: it needs a row at least")


def _nearest(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ""
