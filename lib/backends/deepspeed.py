"""DeepSpeed's ZeRO-2: its settings, and its weights and moments as whole tensors.

Each process holds and updates a part of the fp32 weights and of their moments. The model computes
with copies of all weights, in bf16 or fp16 if the run is.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:  # settings are checked before the slow imports
    from accelerate import Accelerator
    from torch import Tensor, nn

# The settings that follow from the flags.
FLAGS = {
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "train_batch_size": "--train_batch_size",
    "train_micro_batch_size_per_gpu": "--train_batch_size",
}
# What else a deepspeed_config_file may hold.
HONORED = {
    "bf16.enabled",
    "communication_data_type",
    "fp16.auto_cast",
    "fp16.consecutive_hysteresis",
    "fp16.enabled",
    "fp16.hysteresis",
    "fp16.initial_scale_power",
    "fp16.loss_scale",
    "fp16.loss_scale_window",
    "fp16.min_loss_scale",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage",
}
# Keys of Accelerate's YAML that it rejects beside a deepspeed_config_file.
YAML_KEYS = {
    "gradient_accumulation_steps",
    "gradient_clipping",
    "mixed_precision",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "zero3_save_16bit_model",
    "zero_stage",
}
# Of AdamW; DeepSpeed cuts them into parts like the weights.
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_settings() -> None:
    """Check what the launcher tells Accelerate about DeepSpeed.

    Raises:
        InputError: a setting that this script does not honor, or that Accelerate rejects.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        _check_file(Path(file))
        return
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    _check_stage("deepspeed_config: zero_stage", stage)
    for name in ("offload_optimizer_device", "offload_param_device", "moe_layer_cls_names"):
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")
        if value != "none":
            raise InputError(
                f"deepspeed_config: this script does not support {name} ({value}): remove it"
            )


def _check_file(file: Path) -> None:
    name = f"deepspeed_config_file {file}"
    try:
        settings = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{name} is not a readable JSON object: {error}") from error
    for key in sorted(settings.keys() - HONORED - FLAGS.keys()):
        if settings[key] != "none":  # as the device of offload_optimizer
            raise InputError(f"{name}: this script does not support {key}: remove it")
    _check_stage(f"{name}: zero_optimization.stage", str(settings.get("zero_optimization.stage")))
    twice = YAML_KEYS & set(os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(","))
    if twice:
        raise InputError(
            f"{name} and {', '.join(sorted(twice))} are both in the configuration of Accelerate: "
            "keep one of the two"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for precision in ("bf16", "fp16"):
        enabled = settings.get(f"{precision}.enabled", "auto")
        if asked != "no" and enabled not in ("auto", asked == precision):
            raise InputError(
                f"{name}: {precision}.enabled is {json.dumps(enabled)}, but --mixed_precision is "
                f"{asked}: set it to auto"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Join the names of sections and keys: `zero_optimization.stage`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        values = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): part for key, part in values.items()}
    return flat


def _check_stage(name: str, stage: str) -> None:
    if stage != "2":
        raise InputError(
            f"{name} is {stage}, but this script runs ZeRO-2 only: set it to 2, or use "
            "accelerate_configs/fsdp2.yaml, which shards the weights too"
        )


def configure(accelerator: "Accelerator", max_grad_norm: float, plan: Callable[[int], Any]) -> None:
    """Tell DeepSpeed, where it is used, what follows from the flags.

    It clips gradients itself, and the loaders have batches of several sizes.

    Args:
        plan: returns the `Plan` of an epoch.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    accumulation = accelerator.gradient_accumulation_steps
    micro_batch_size = plan(0).most_rows
    ours = {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "train_batch_size": micro_batch_size * accumulation * accelerator.num_processes,
        "train_micro_batch_size_per_gpu": micro_batch_size,
    }
    for name, value in ours.items():
        theirs = plugin.deepspeed_config.get(name, "auto")
        if theirs not in ("auto", value) and accelerator.is_main_process:
            print(
                f"DeepSpeed's {name} is {theirs} in its configuration: training with {value}, "
                f"from {FLAGS[name]}",
                file=sys.stderr,
            )
    plugin.deepspeed_config.update(ours)


def scales_loss(accelerator: "Accelerator") -> bool:
    """True where DeepSpeed runs in fp16, and itself skips the updates that overflow."""
    return accelerator.state.deepspeed_plugin is not None and accelerator.mixed_precision == "fp16"


class LossScale:
    """The state of DeepSpeed's loss scaling, as checkpoints keep it."""

    NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, optimizer: Any) -> None:
        self.scaler = optimizer.loss_scaler

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self.scaler)[name] for name in self.NAMES if name in vars(self.scaler)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self.scaler).update(state)


def gather_weights(model: "nn.Module") -> dict[str, "Tensor"]:
    """Return the weights in fp32, under the names of the state dict; empty but on rank 0.

    All processes call this.
    """
    from deepspeed.utils import safe_get_full_fp32_param
    from torch.distributed import get_rank

    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        whole = safe_get_full_fp32_param(weight)  # None for a buffer or a frozen weight
        if whole is None:
            whole = weight.float() if weight.is_floating_point() else weight
        if get_rank() == 0:
            weights[name] = whole.detach().cpu()
    return weights


def gather_moments(model: "nn.Module", optimizer: Any) -> dict[str, "Tensor"]:
    """Return the moments as `<parameter>.<moment>`; empty but on rank 0.

    All processes call this.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state
    from torch.distributed import get_rank

    names = {weight: name for name, weight in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for group, part in _groups(optimizer):
        if not optimizer.state[part]:
            continue  # under fp16 all updates so far may have been skipped
        # DeepSpeed does so in the first update, but for the first group only.
        lazy_init_hp_params_optimizer_state(group, part, optimizer.state)
        for weight in group:
            whole = {name: safe_get_full_optimizer_state(weight, name) for name in MOMENTS}
            whole["step"] = optimizer.state[part]["step"]
            if get_rank() == 0:
                moments |= {f"{names[weight]}.{name}": value.cpu() for name, value in whole.items()}
    return moments


def load(
    model: "nn.Module",
    optimizer: Any,
    weights: Mapping[str, "Tensor"],
    moments: Mapping[str, Mapping[str, "Tensor"]],
) -> None:
    """Load whole weights, and moments by parameter, into the parts of this process."""
    import torch
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    model.load_state_dict(weights)
    names = {weight: name for name, weight in model.named_parameters()}
    for group, part in _groups(optimizer):
        for weight in group:
            safe_set_full_fp32_param(weight, weights[names[weight]])
        saved = {weight: moments[names[weight]] for weight in group if names[weight] in moments}
        if not saved:
            continue
        state = {moment: torch.zeros_like(part) for moment in MOMENTS}
        step = max(values["step"] for values in saved.values())
        optimizer.state[part] = {"step": step.to(part.device, copy=True), **state}
        lazy_init_hp_params_optimizer_state(group, part, optimizer.state)
        for weight, values in saved.items():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(weight, values[moment], moment)


def _groups(optimizer: Any) -> Iterator[tuple[list["nn.Parameter"], "Tensor"]]:
    """Yield the weights of each group of the optimizer, and this process's part of them, in fp32.

    The part is what the AdamW inside updates: one vector.
    """
    return zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
