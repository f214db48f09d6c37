"""FSDP2: what is sharded, and whole weights and moments gathered from and distributed to shards.

PyTorch's functions for it are imported when first used, as they take a second.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.errors import InputError


def configure(
    accelerator: Accelerator,
    model: PreTrainedModel,
    encoder_layers: Callable[[PreTrainedModel], nn.ModuleList],
) -> None:
    """Shard each of the encoder's layers, unless the user names others, and sum gradients in fp32.

    Accelerate would shard the model's `_no_split_modules`, which fails where they hold the word
    embeddings, as BERT's do: it shards those by themselves. It would sum gradients in the
    precision of the forward pass.

    Raises:
        InputError: the model has no stack of layers, or Accelerate cannot shard what the user asks.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32
        )
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        if plugin.transformer_cls_names_to_wrap is None:
            layers = {type(layer).__name__ for layer in encoder_layers(model)}
            plugin.transformer_cls_names_to_wrap = sorted(layers)
        _check_classes(model, plugin.transformer_cls_names_to_wrap)


def _check_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Check that Accelerate can shard each module of these classes."""
    field = "fsdp_transformer_layer_cls_to_wrap"
    remedy = "leave the setting out to shard the encoder's layers"
    modules = {type(module).__name__: module for module in model.modules()}
    embeddings = model.get_input_embeddings()
    for name in names:
        if name not in modules:
            raise InputError(f"{field} {name}: {type(model).__name__} has no such module; {remedy}")
        if modules[name] is not embeddings and embeddings in modules[name].modules():
            raise InputError(
                f"{field} {name}: it holds the word embeddings, which Accelerate shards by "
                f"themselves; {remedy}"
            )


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights; empty but on rank 0. All processes call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments as `<weight>.<moment>`; empty but on rank 0. All processes call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=options))
    return {
        f"{name}.{moment}": value
        for name, values in moments.get("state", {}).items()
        for moment, value in values.items()
    }


def scatter(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Load into the shards the whole weights, and moments by parameter, that rank 0 has.

    The others give empty mappings, and hold one whole tensor at a time.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    state["state"] = dict(moments)
    options = dataclasses.replace(options, strict=False)  # some weights never had a gradient
    set_optimizer_state_dict(model, optimizer, state, options=options)
    # For these PyTorch makes up moments.
    (trained,) = broadcast_object_list([set(moments)])
    for name, weight in model.named_parameters():
        if name not in trained:
            optimizer.state.pop(weight, None)
