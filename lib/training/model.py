"""The tokenizer and the model: loaded, checked, and partly reinitialized."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.errors import InputError
from lib.hub.client import reason_of
from lib.hub.download import download_model
from lib.hub.reach import REMEDY

# A row for the checks that need a forward pass.
PROBE = "one two"


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
    gradient_checkpointing: bool,
    seed: int,
) -> PreTrainedModel:
    """Load pretrained weights into a classifier or, without label names, a regressor.

    New weights, of the classifier and of `reinit_layers`, are drawn from `seed` alone.

    Raises:
        InputError: there are no weights, they do not fit config.json or the tokenizer or are not
            finite, the classifier has another number of labels, `max_length` is too long, or the
            model has no gradient checkpointing.
    """
    torch.manual_seed(seed)
    config = _load_config(
        name, revision, trust_remote_code, label_names, may_replace=ignore_mismatched_sizes
    )
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that `_check_weights` can name the weight
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
    _check_weights(
        name, model, loaded["mismatched_keys"], may_replace_classifier=ignore_mismatched_sizes
    )
    reinitialize(model, reinit_layers)
    _check_fit(max_length, model, tokenizer)
    _agree_on_padding(model, tokenizer)
    freeze_unused(model, tokenizer)
    if gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    return model


def _load_config(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    label_names: tuple[str, ...],
    *,
    may_replace: bool,
) -> Any:
    """Load config.json, and give it the labels of the data."""
    num_labels = len(label_names) or 1
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "config.json", error)) from error
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
    return config


def _check_weights(
    name: str, model: PreTrainedModel, mismatched: Iterable[Any], *, may_replace_classifier: bool
) -> None:
    """Check that the weights have the shapes of config.json, and are finite."""
    for weight, saved, expected in mismatched:
        if not may_replace_classifier or weight.startswith(f"{model.base_model_prefix}."):
            raise InputError(
                f"--model_name_or_path {name}: {weight} has the shape {list(saved)}, and "
                f"config.json asks for {list(expected)}: they do not belong together"
            )
    for weight, values in model.named_parameters():
        if not torch.isfinite(values).all():
            raise InputError(
                f"--model_name_or_path {name}: {weight} holds values that are not finite: get the "
                "weights again, or choose another checkpoint"
            )


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


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's layers from the bottom to the top: the longest list of modules.

    Raises:
        InputError: the model has no list of modules.
    """
    lists = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no stack of layers to tell apart: use "
            "--layerwise_lr_decay 1, --reinit_layers 0 and, with FSDP, fsdp_auto_wrap_policy: "
            "NO_WRAP"
        )
    return max(lists, key=len)


def reinitialize(model: PreTrainedModel, num_layers: int) -> None:
    """Give the top `num_layers` encoder layers, and the pooler, new random weights.

    Source: Zhang et al. (2021), Revisiting Few-sample BERT Fine-tuning, section 5.
    """
    if num_layers == 0:
        return
    layers = encoder_layers(model)
    if num_layers > len(layers):
        raise InputError(
            f"--reinit_layers {num_layers} is more than the model's {len(layers)} encoder layers"
        )
    modules = [*layers[-num_layers:], getattr(model.base_model, "pooler", None)]
    for module in modules:
        for part in module.modules() if module is not None else ():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=model.config.initializer_range)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"--gradient_checkpointing: {type(model).__name__} does not support it: leave it out, "
            "and lower --per_device_train_batch_size to save memory"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _check_fit(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model takes what the tokenizer gives.

    Raises:
        InputError: rows of `max_length` are longer than the model's positions, or the tokenizer
            has more tokens than the model.
    """
    tokens = getattr(model.config, "vocab_size", len(tokenizer))
    if len(tokenizer) > tokens:
        raise InputError(
            f"--model_name_or_path: the tokenizer has {len(tokenizer)} tokens, the model {tokens}: "
            "they do not belong together"
        )
    limit = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet: -1 for none
    positions = min(limit if limit > 0 else max_length, tokenizer.model_max_length)
    if max_length > positions:
        raise InputError(
            f"--max_length {max_length} is more than the {positions} tokens that the model takes: "
            f"give --max_length {positions} or less"
        )


@torch.no_grad()
def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the padding token of its tokenizer, and check the side it is put on.

    Padding on the left leaves the logits of XLNet and of rotary positions alone, but shifts the
    positions of GPT-2 and BERT.

    Raises:
        InputError: the logits of a row would depend on the rows that it is batched with.
    """
    config = model.config.get_text_config()
    # Decoders classify at the last token that is not this one. Encoders such as RoBERTa count
    # positions from the one that they were pretrained with.
    if config.pad_token_id is None or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.padding_side == "right":
        return
    row = tokenizer(PROBE, return_tensors="pt")
    longer = row["input_ids"].shape[1] + 4
    padded = tokenizer(PROBE, padding="max_length", max_length=longer, return_tensors="pt")
    if not torch.allclose(model(**row).logits, model(**padded).logits, rtol=1e-2, atol=1e-3):
        raise InputError(
            "--model_name_or_path: its tokenizer pads on the left, which changes what "
            f"{type(model).__name__} computes for a row: set padding_side to right in "
            "tokenizer_config.json"
        )


def freeze_unused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Freeze the weights that no row reaches, such as XLNet's `mask_emb`.

    DDP waits for a gradient of every weight that is not frozen. Its `find_unused_parameters`
    searches the graph of each update; here that of one row is searched, in evaluation mode, once.
    An expert that this row is not sent to stays: where some modules of a list are used, all are.
    """
    used = _weights_behind(model(**tokenizer(PROBE, return_tensors="pt")).logits)
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList | nn.ModuleDict):
            weights = [{id(weight) for weight in part.parameters()} for part in modules.children()]
            unused = [part for part in weights if not part & used]
            if len(unused) < len(weights):
                used = used.union(*unused)
    for weight in model.parameters():
        if id(weight) not in used:
            weight.requires_grad_(False)


def _weights_behind(output: Tensor) -> set[int]:
    """Return the `id` of each weight that a gradient of `output` would reach."""
    found, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))  # only the graph's leaves have one
            nodes += [following for following, _ in node.next_functions]
    return found


def revision_of(name: str, revision: str | None) -> str | None:
    """Return the commit of a cached model of the hub; None for a folder."""
    if Path(name).is_dir():
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None
