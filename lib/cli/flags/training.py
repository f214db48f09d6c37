"""The flags of the training."""

import dataclasses
import functools

from lib.backends.settings import PRECISIONS
from lib.cli.flags.declaration import at_least, between, flag

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)

_training = functools.partial(flag, "training")


@dataclasses.dataclass(frozen=True, init=False)
class TrainingFlags:
    """How the model is trained."""

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
    per_device_train_batch_size: int | str | None = _training(
        None,
        "Most rows of one forward pass; auto: as many as fit into memory. A number alone: an "
        "update has this x accumulation x processes rows.",
        rule=at_least(1, "it counts the rows of one forward pass; auto finds how many fit"),
        words=("auto",),
        metavar="N|auto",
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
    mixed_precision: str | None = _training(
        None,
        "auto is bf16 where all processes compute in it, else no. Default: as the launcher says.",
        choices=("auto", *PRECISIONS),
        resume="free",  # the precision itself is a part of a checkpoint's identity
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
    label_smoothing: float = _training(
        0.0,
        "Share of the target's probability spread over all classes.",
        rule=between(0, 0.999999, "a usual value is 0.1"),
    )
    class_weights: tuple[str, ...] = _training(
        ("none",),
        "Weigh the classes in the loss: balanced (rarer ones more), none, or a number for each.",
        metavar="balanced|none|W",
    )
    seed: int = _training(
        42,
        "Decides the order of rows, dropout and new weights.",
        rule=between(0, 2**32 - 1, "it also seeds NumPy's generators"),
    )
