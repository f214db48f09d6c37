"""Tokenizer, model, AdamW's parameter groups, the learning rate, and the loss."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from lib.data.tasks import IGNORED
from lib.errors import InputError
from lib.hub.reach import REMEDY


def load_tokenizer(
    name: str, *, revision: str | None, use_fast: bool, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub or in a folder.

    Raises:
        InputError: there is none, or it has no padding token.
    """
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
        # transformers 5 makes an empty tokenizer of a folder that has none.
        raise InputError(_unloadable(name, "tokenizer", ValueError("no vocabulary")))
    if tokenizer.pad_token is None:
        raise InputError(
            f"--model_name_or_path {name}: its tokenizer has no padding token, which batches of "
            "rows need; set one in tokenizer_config.json (pad_token)"
        )
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None,
    label_names: tuple[str, ...],
    trust_remote_code: bool,
    ignore_mismatched_sizes: bool,
    reinit_layers: int,
    seed: int,
) -> PreTrainedModel:
    """A classifier (or, without label names, a regressor) on pretrained weights.

    What is new, the classifier and `reinit_layers`, is drawn from `seed` alone.

    Raises:
        InputError: no weights, or a classifier with another number of labels.
    """
    num_labels = len(label_names) or 1
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "config.json", error)) from error
    saved_labels = config.num_labels if _has_classifier(config) else num_labels
    if saved_labels != num_labels and not ignore_mismatched_sizes:
        raise InputError(
            f"--model_name_or_path {name} classifies into {saved_labels} labels, the data have "
            f"{num_labels}: --ignore_mismatched_sizes puts a new classifier in its place"
        )
    config.num_labels = num_labels
    config.problem_type = "single_label_classification" if label_names else "regression"
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: number for number, label in enumerate(label_names)}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except SafetensorError as error:
        raise InputError(
            f"--model_name_or_path {name}: its weights are damaged, or a pointer of Git LFS "
            f"({error}): get them again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(name, "weights (model.safetensors)", error)) from error
    reinitialise(model, reinit_layers)
    return model


def _has_classifier(config: Any) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _unloadable(name: str, what: str, error: BaseException) -> str:
    reason = " ".join(str(error).split("\n")[0].split())
    if Path(name).is_dir():
        return f"--model_name_or_path {name}: the folder has no usable {what}: {reason}"
    return (
        f"--model_name_or_path {name} is neither a folder, nor cached, nor to be had from the hub: "
        f"{reason}; {REMEDY}"
    )


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers, from the bottom to the top: the longest list of modules.

    Raises:
        InputError: the model has no list of modules.
    """
    lists = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no stack of layers to tell apart: use "
            "--layerwise_lr_decay 1 and --reinit_layers 0"
        )
    return max(lists, key=len)


def reinitialise(model: PreTrainedModel, num_layers: int) -> None:
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


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    weight_decay: float,
    layerwise_lr_decay: float,
) -> list[dict[str, Any]]:
    """AdamW's groups: no weight decay on biases and normalisation weights (any vector).

    With `layerwise_lr_decay` below 1, the classifier and pooler learn at `learning_rate`, the top
    layer at that times the decay, and so on down to the embeddings. Source: Howard and Ruder
    (2018), section 3.2; Zhang et al. (2021), section 3.
    """
    depth_of: dict[int, int] = {}
    if layerwise_lr_decay != 1:
        layers = encoder_layers(model)
        for parameter in model.base_model.parameters():
            depth_of[id(parameter)] = len(layers) + 1
        for number, layer in enumerate(layers):
            for parameter in layer.parameters():
                depth_of[id(parameter)] = len(layers) - number
        pooler = getattr(model.base_model, "pooler", None)
        for parameter in pooler.parameters() if pooler is not None else ():
            depth_of[id(parameter)] = 0
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((depth_of.get(id(parameter), 0), decay), []).append(parameter)
    return [
        {"params": group, "lr": learning_rate * layerwise_lr_decay**depth, "weight_decay": decay}
        for (depth, decay), group in groups.items()
    ]


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, num_warmup_updates: int, num_updates: int
) -> LambdaLR:
    """The learning rate as a function of the update, to be stepped once per update.

    Not for `accelerator.prepare`, whose schedulers step once per process.
    """
    schedule = get_scheduler(kind, optimizer, num_warmup_updates, num_updates)
    assert isinstance(schedule, LambdaLR)
    return schedule


def set_update(schedule: LambdaLR, update: int) -> None:
    """Set the learning rates to those of the update after `update` updates."""
    state = schedule.state_dict()
    rates = [
        float(rate) * factor(update)
        for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**state, "last_epoch": update, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def loss_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the rows of the cross-entropy, or of the squared error if there is one logit.

    A sum, so that an update's loss is the same however its rows are cut into micro-batches.

    Args:
        logits: (rows, classes), or (rows, 1) for a regression; any floating dtype.
        labels: (rows,); rows with the label `IGNORED` do not count.
    """
    logits = logits.float()
    if logits.shape[-1] == 1:
        errors = (logits.squeeze(-1) - labels.float()).square()
        return torch.where(labels == IGNORED, 0.0, errors).sum()
    return nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )


def check_fit(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that the model can take what the tokenizer gives.

    Raises:
        InputError: rows of `max_length` are longer than the model's positions, or the tokenizer
            has more words than the model.
    """
    words = getattr(model.config, "vocab_size", len(tokenizer))
    if len(tokenizer) > words:
        raise InputError(
            f"--model_name_or_path: the tokenizer has {len(tokenizer)} words, the model {words}: "
            "they do not belong together"
        )
    limit = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet: -1 for none
    positions = min(limit if limit > 0 else max_length, tokenizer.model_max_length)
    if max_length > positions:
        raise InputError(
            f"--max_length {max_length} is more than the {positions} tokens that the model takes: "
            f"give --max_length {positions} or less"
        )


def learning_rate_at(schedule: LambdaLR, update: int) -> float:
    """The highest learning rate of the update after `update` updates."""
    factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    return max(float(rate) * factor(update) for rate, factor in factors)


def revision_of(name: str, revision: str | None) -> str | None:
    """The commit of a model on the hub that the cache holds; None for a folder."""
    if Path(name).is_dir():
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({torch.get_num_threads()} threads)"
