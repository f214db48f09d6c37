"""The flags of the model."""

import dataclasses
import functools

from lib.cli.flags.declaration import at_least, flag

# Not the names of kernels on the hub, which would be downloaded and executed.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")

_model = functools.partial(flag, "model")


@dataclasses.dataclass(frozen=True, init=False)
class ModelFlags:
    """Which model is trained."""

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
    freeze_layers: int | None = _model(
        None,
        "Freeze the embeddings and the lowest N encoder layers; 0 freezes the embeddings alone.",
        rule=at_least(0, "it counts encoder layers from the bottom"),
    )
    lora_rank: int | None = _model(
        None,
        "Train adapters of this rank (LoRA) and the classifier alone; needs the package peft.",
        rule=at_least(1, "a usual value is 8"),
    )
    lora_alpha: float | None = _model(
        None,
        "Scale of the adapters, divided by --lora_rank. Default: twice the rank.",
        rule=at_least(0, "a usual value is twice the rank"),
    )
    attn_implementation: str | None = _model(
        None,
        "Implementation of attention. Default: that of transformers, sdpa where the model has it.",
        choices=ATTENTION,
        resume="free",
    )
