"""The device of a process, and the precision that the model runs in."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xla":
        return "XLA"
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({threads} thread{'s' * (threads > 1)})"


def has_fused_adamw(device: torch.device) -> bool:
    """True where PyTorch has a fused AdamW, which `Meter` can tell to skip an update."""
    return device.type in ("cpu", "cuda", "mps", "xpu")


def compiles_shapes(accelerator: Accelerator) -> bool:
    """True where each new shape of a batch costs a compilation: on TPUs, and in torch.compile."""
    compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    return compiled or accelerator.distributed_type == DistributedType.XLA


def precision(accelerator: Accelerator) -> str:
    """Return the precision that the model really runs in; Accelerate runs fp16 on CPUs as fp32."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        return "no"
    return str(accelerator.mixed_precision)


def degradations(accelerator: Accelerator) -> list[str]:
    """Return a line for each way in which the run falls short of what was asked, or possible.

    On a machine without a GPU, `accelerate launch` sets OMP_NUM_THREADS=1 if it is given neither
    a configuration file with `use_cpu` nor a number of threads.
    """
    lines = []
    if precision(accelerator) != accelerator.mixed_precision:
        lines.append("CPUs have no fp16: training in fp32")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and torch.get_num_threads() == 1 and (cores or 1) > 1:
        lines.append(
            f"training with 1 thread on {cores} cores: unset OMP_NUM_THREADS, or give accelerate "
            "launch --config_file accelerate_configs/cpu.yaml"
        )
    return lines
