"""Weights and moments as whole tensors under the names of the weights, whatever the backend."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lib.backends import deepspeed, fsdp


def gather_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights in fp32; empty but on the main process.

    All processes call this.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp.gather_weights(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return deepspeed.gather_weights(model)
    if not accelerator.is_main_process:
        return {}
    weights = model.state_dict()
    if accelerator.distributed_type == DistributedType.XLA:
        # There tensors have no storage, which safetensors asks for.
        return {name: value.cpu() for name, value in weights.items()}
    return weights


def gather_moments(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the moments as `<weight>.<moment>`; empty but on the main process.

    All processes call this. Learning rates, which the optimizer's own state dict adds, follow from
    the configuration.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp.gather_moments(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return deepspeed.gather_moments(model, optimizer)
    if not accelerator.is_main_process:
        return {}
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    return {
        f"{names[weight]}.{moment}": value
        for weight, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def load_tensors(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Load whole weights, and moments by weight. All processes call this.

    Under FSDP only what the main process gives counts.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        fsdp.scatter(model, optimizer, weights, moments)
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.load(model, optimizer, weights, moments)
        return
    model.load_state_dict(weights)
    names = {weight: name for name, weight in model.named_parameters()}
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {
        index: moments[names[weight]]
        for index, weight in enumerate(order)
        if names[weight] in moments  # the others never had a gradient
    }
    optimizer.load_state_dict(state)


def copy_into(buffers: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU, in buffers that the next copies use again.

    New memory costs many times what the copying does.
    """
    for name, value in tensors.items():
        if name not in buffers:
            buffers[name] = torch.empty(value.shape, dtype=value.dtype)
        buffers[name].copy_(value)
    return {name: buffers[name] for name in tensors}


def by_weight(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the moments of each weight, from `<weight>.<moment>`."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        weight, _, moment = name.rpartition(".")
        grouped.setdefault(weight, {})[moment] = value
    return grouped


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU; those that share memory, as tied embeddings do, as copies."""
    copies: dict[str, Tensor] = {}
    seen = set()
    for name, value in tensors.items():
        here = value.cpu()  # first: XLA tensors have no storage to ask for
        place = here.untyped_storage().data_ptr()
        copies[name] = here.clone() if place in seen else here.contiguous()
        seen.add(place)
    return copies
