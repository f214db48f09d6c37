"""Check that config.json, the weights, the tokenizer and the length of the rows fit together."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import InputError
from lib.model.layers import PROBE


def check_weights(
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


def check_fit(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
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
def agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
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
