"""Load the tokenizer and the model."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from lib.errors import InputError
from lib.hub.client import reason_of
from lib.hub.download import download_model
from lib.hub.reach import REMEDY
from lib.model.adapters import add_adapters
from lib.model.checks import agree_on_padding, check_fit, check_weights
from lib.model.layers import freeze_lowest, freeze_unused, reinitialize, shorten_last

FLASH_ATTENTION = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}


def load_tokenizer(
    name: str, revision: str | None, trust_remote_code: bool, *, use_fast: bool
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model on the hub or in a folder, and download that model whole.

    Raises:
        InputError: there is none, or it has no padding token.
    """
    download_model(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision or "main",
            use_fast=use_fast,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "tokenizer", error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers 5 returns an empty tokenizer for a folder that has none.
        raise InputError(_unloadable(name, "tokenizer", ValueError("no vocabulary")))
    if tokenizer.pad_token is None:
        raise InputError(
            f"--model_name_or_path {name}: its tokenizer has no padding token, which batches of "
            f'rows need: add "pad_token": "{tokenizer.eos_token or tokenizer.unk_token}" to '
            "tokenizer_config.json"
        )
    return tokenizer


def load_model(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase,
    /,
    *,
    label_names: tuple[str, ...],
    max_length: int,
    ignore_mismatched_sizes: bool,
    reinit_layers: int,
    freeze_layers: int | None,
    lora_rank: int | None,
    lora_alpha: float | None,
    gradient_checkpointing: bool,
    attn_implementation: str | None,
    seed: int,
) -> PreTrainedModel:
    """Load pretrained weights into a classifier or, without label names, a regressor.

    New weights, of the classifier and of `reinit_layers`, are drawn from `seed` alone.

    Raises:
        InputError: there are no weights, they do not fit config.json or the tokenizer or are not
            finite, the classifier has another number of labels, `max_length` is too long, or the
            model has no gradient checkpointing, no such attention or fewer layers.
    """
    torch.manual_seed(seed)
    config, saved_names = _load_config(
        name, revision, trust_remote_code, label_names, may_replace=ignore_mismatched_sizes
    )
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that `check_weights` can name the weight
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise InputError(
            f"--model_name_or_path {name}: its weights are damaged, or a pointer of Git LFS "
            f"({error}): get them again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "weights (model.safetensors)", error)) from error
    check_weights(
        name, model, loaded["mismatched_keys"], may_replace_classifier=ignore_mismatched_sizes
    )
    _reorder_classifier(model, saved_names, label_names)
    reinitialize(model, reinit_layers)
    check_fit(max_length, model, tokenizer)
    agree_on_padding(model, tokenizer)
    if freeze_layers is not None:
        freeze_lowest(model, tokenizer, freeze_layers, reinit_layers)
    if lora_rank is not None:
        new_weights = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
        add_adapters(model, lora_rank, lora_alpha, new_weights)
    freeze_unused(model, tokenizer)
    if gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    if attn_implementation is not None:  # last: the probes above run on the CPU
        _set_attention(model, attn_implementation)
    shorten_last(model)
    return model


def _load_config(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    label_names: tuple[str, ...],
    *,
    may_replace: bool,
) -> tuple[Any, tuple[str, ...]]:
    """Load config.json, give it the labels of the data, and return it with those it had."""
    num_labels = len(label_names) or 1
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "config.json", error)) from error
    config.__dict__.pop("calibration", None)  # of an earlier stage
    saved_names = tuple(name for _, name in sorted(config.id2label.items()))
    saved_labels = config.num_labels if _has_classifier(config) else num_labels
    if saved_labels != num_labels and not may_replace:
        raise InputError(
            f"--model_name_or_path {name} classifies into {saved_labels} labels, the data have "
            f"{num_labels}: --ignore_mismatched_sizes replaces the classifier by a new one"
        )
    config.num_labels = num_labels
    config.problem_type = "single_label_classification" if label_names else "regression"
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: number for number, label in enumerate(label_names)}
    return config, saved_names


def _reorder_classifier(
    model: PreTrainedModel, saved_names: tuple[str, ...], label_names: tuple[str, ...]
) -> None:
    """Move each row of the classifier to the place that its label has in these data.

    Only where both have the same labels: an earlier stage may have numbered them otherwise.
    """
    if saved_names == label_names or sorted(saved_names) != sorted(label_names):
        return
    order = [saved_names.index(label) for label in label_names]
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix) and len(parameter) == len(order):
            parameter.data = parameter.data[order]


def _has_classifier(config: Any) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _unloadable(name: str, what: str, error: BaseException) -> str:
    reason = reason_of(error)
    if Path(name).is_dir():
        return f"--model_name_or_path {name}: the folder has no usable {what}: {reason}"
    return (
        f"--model_name_or_path {name} is neither a folder, nor cached, nor available from the hub: "
        f"{reason}; {REMEDY}"
    )


def _set_attention(model: PreTrainedModel, name: str) -> None:
    flag = f"--attn_implementation {name}"
    if name in FLASH_ATTENTION and not FLASH_ATTENTION[name]():
        # transformers would take a kernel from the hub instead, which is code.
        raise InputError(f"{flag}: the package of that name is not installed: use sdpa")
    try:
        model.set_attn_implementation(name)
        reason = "it cannot be set"
    except (ImportError, ValueError) as error:
        reason = str(error).split(". ")[0]
    if model.config._attn_implementation != name:
        raise InputError(
            f"{flag}: {type(model).__name__} does not have it on this machine ({reason}): leave "
            "the flag out"
        )


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"--gradient_checkpointing: {type(model).__name__} does not support it: leave it out, "
            "and lower --per_device_train_batch_size to save memory"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def revision_of(name: str, revision: str | None) -> str | None:
    """Return the commit of a cached model of the hub; None for a folder."""
    if Path(name).is_dir():
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None
