"""Adapters of low rank (LoRA), trained instead of the weights that they are added to.

Source: Hu et al. (2022), LoRA: Low-Rank Adaptation of Large Language Models.
"""

from collections.abc import Container, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# How peft names what it puts in place of a linear layer.
ADAPTER, WRAPPED = ".lora_", ".base_layer."


def add_adapters(
    model: PreTrainedModel, rank: int, alpha: float | None, new_weights: Container[str]
) -> None:
    """Add an adapter to each pretrained linear layer; freeze all but these and what is new.

    The classifier is trained as a whole, and so are weights that the pretrained model lacked.

    Args:
        alpha: an adapter's product is added alpha / rank times; None stands for twice the rank.
        new_weights: names of the weights that were drawn at random.
    """
    import peft

    linear = [
        f"{model.base_model_prefix}.{name}"
        for name, part in model.base_model.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    ]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=[name for name in linear if f"{name}.weight" not in new_weights],
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
    )
    pretrained = {
        id(weight)
        for name, weight in model.base_model.named_parameters(prefix=model.base_model_prefix)
        if name not in new_weights
    }
    peft.inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(ADAPTER in name or id(weight) not in pretrained)


def merge_adapters(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model: adapters merged, and the names as they were.

    Args:
        weights: whole weights under the names of `model`, which may hold only shards.
    """
    merged = {}
    for name, value in weights.items():
        if ADAPTER in name:
            continue
        layer = name.removesuffix(f"{WRAPPED}weight")
        if layer != name:
            part = model.get_submodule(layer)
            down, up = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            product = up @ down * part.scaling["default"]  # type: ignore[index]
            value = value + (product.T if part.fan_in_fan_out else product)
        merged[name.replace(WRAPPED, ".")] = value
    return merged
