"""Models loaded as the script loads them."""

from lib.model.loading import load_model, load_tokenizer


def load(folder, **changes):
    arguments = {
        "label_names": ("no", "yes"),
        "max_length": 64,
        "ignore_mismatched_sizes": False,
        "reinit_layers": 0,
        "freeze_layers": None,
        "lora_rank": None,
        "lora_alpha": None,
        "gradient_checkpointing": False,
        "attn_implementation": None,
        "seed": 1,
    }
    return load_model(str(folder), None, False, tokenizer_of(folder), **{**arguments, **changes})


def tokenizer_of(folder):
    return load_tokenizer(str(folder), None, False, use_fast=True)
