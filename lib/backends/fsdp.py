"""Weights and moments of an FSDP model, gathered from its shards and distributed to them."""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

# Whole tensors under the names of the parameters, on the main process: the same for shards, for
# replicas and for one process, so that a run may be resumed with any of them.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights, and the moments as `<parameter>.<moment>`; empty but on rank 0."""
    whole = get_state_dict(model, optimizer, options=WHOLE)
    weights, moments = cast(tuple[dict[str, Any], dict[str, Any]], whole)
    return weights, {
        f"{name}.{moment}": value
        for name, values in moments.get("state", {}).items()
        for moment, value in values.items()
    }


def scatter(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Any],
    moments: dict[str, dict[str, Tensor]],
) -> None:
    """Load whole weights, and moments by parameter, into the shards; all ranks have both."""
    options = dataclasses.replace(WHOLE, cpu_offload=False)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    # PyTorch makes up moments for weights that never had a gradient, and insists on them here.
    made_up = state["state"].keys() - moments.keys()
    state["state"] = {name: moments.get(name, values) for name, values in state["state"].items()}
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
    )
    for name, weight in model.named_parameters():
        if name in made_up:
            del optimizer.state[weight]
