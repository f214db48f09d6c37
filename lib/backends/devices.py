"""The device of a process, and the precision that the model runs in."""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from transformers import AttentionMaskInterface

from lib.backends import settings

# MiniLM on an x86 processor with AVX2 and without AVX-512.
SLOWER_IN_BF16 = " (8 to 10 times on one with AVX2)"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xla":
        return "XLA"
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({threads} thread{'s' * (threads > 1)})"


# Dense peak rates in TFLOP/s, by what is in the name of the GPU: fp32, and bf16 or fp16. Source:
# NVIDIA's data sheets, which list the latter with sparsity, twice as high, for H100, H200 and L4.
PEAK_TFLOPS = {
    "H200 NVL": (60.0, 835.5),
    "H200": (67.0, 989.5),
    "H100 PCIe": (51.0, 756.5),
    "H100 80GB HBM3": (67.0, 989.5),
    "A100": (19.5, 312.0),
    "L4": (30.3, 121.0),
    "T4": (8.1, 65.0),
    "V100-SXM2": (15.7, 125.0),
}
# These have tensor cores for fp16 only.
WITHOUT_BF16 = ("T4", "V100-SXM2")


def peak_tflops(accelerator: Accelerator) -> float | None:
    """Return the published rate of this process's GPU in the run's precision; None if not known."""
    device = accelerator.device
    if device.type != "cuda":
        return None
    name, used = device_name(device), precision(accelerator)
    for known, (single, half) in PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b", name) and "MIG" not in name:
            if used == "no":  # with TF32, the rate is another
                return single if torch.get_float32_matmul_precision() == "highest" else None
            return None if used == "bf16" and known in WITHOUT_BF16 else half
    return None


def peak_memory(device: torch.device) -> tuple[str, float] | None:
    """Return the most memory of this process so far, in GiB, by name; None where it is not known.

    What PyTorch allocated on a GPU; on a CPU all that was resident: libraries and files count too.
    """
    if device.type == "cpu" and sys.platform in ("linux", "darwin"):
        import resource  # Windows has no such module

        unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return "peak_resident_memory_gib", peak / 2**30
    if device.type in ("cuda", "xpu"):
        peak = getattr(torch, device.type).max_memory_allocated(device)
        return "peak_device_memory_gib", peak / 2**30
    return None


def has_fused_adamw(device: torch.device) -> bool:
    """True where PyTorch has a fused AdamW, which `Meter` can tell to skip an update.

    On Apple's MPS it ignores `found_inf` before https://github.com/pytorch/pytorch/pull/186360, and
    would apply a NaN.
    """
    return device.type in ("cpu", "cuda", "xpu")


def compiles_shapes(accelerator: Accelerator) -> bool:
    """True where each new shape of a batch costs a compilation: on TPUs, and in torch.compile."""
    compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    return compiled or accelerator.distributed_type == DistributedType.XLA


def build_every_mask() -> None:
    """Keep transformers from reading masks from the device, in each forward pass.

    It leaves out a mask that hides nothing, and waits for the device to find out. On CPUs, where it
    is free, leaving it out is faster.
    """
    masks = AttentionMaskInterface()
    for name in ("sdpa", "eager"):
        AttentionMaskInterface.register(name, partial(_build_mask, masks[name]))


def _build_mask(build: Callable[..., Any], *positional: Any, **options: Any) -> Any:
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return build(*positional, **options)


def precision(accelerator: Accelerator) -> str:
    """Return the precision that the model really runs in; Accelerate runs fp16 on CPUs as fp32."""
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        return "fp16" if by_deepspeed else "no"
    return str(accelerator.mixed_precision)


def computes_in_bf16(device: torch.device) -> bool:
    """True where the hardware has bf16; elsewhere PyTorch converts to fp32 and back, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    oneDNN = torch.backends.mkldnn.is_available()
    return oneDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fastest_precision(device: torch.device) -> str:
    """Return bf16 for a CPU or a CUDA GPU that computes in it, else "no".

    On other devices it was never run.
    """
    return "bf16" if device.type in ("cpu", "cuda") and computes_in_bf16(device) else "no"


def draws_in_parallel() -> bool:
    """True where PyTorch draws dropout's masks on all threads: with MKL, on Intel's CPUs.

    Source: `bernoulli_mkl_kernel` in ATen/native/cpu/DistributionKernels.cpp.
    """
    cpus = Path("/proc/cpuinfo")
    vendor = cpus.read_text() if cpus.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in vendor


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leaves_a_core(accelerator: Accelerator) -> bool:
    """True where training leaves a core idle: on accelerators, or on fewer threads than cores."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return accelerator.device.type != "cpu" or here * torch.get_num_threads() < num_cores()


def free_memory() -> int:
    """Return the bytes that this process may still allocate, on its machine and in its job."""
    import psutil

    return min(psutil.virtual_memory().available, *_free_in_groups(Path("/")))


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what is free in each control group of this process that limits its memory.

    Containers and Slurm limit memory so; cached pages of files count as used there, and are given
    back on demand. Source: the kernel's cgroup-v2.rst, and memory.rst for version 1.
    """
    yield sys.maxsize
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        group = top / place.lstrip("/")
        for folder in (group, *group.parents):
            bound = "".join(_lines(folder / limit)) if folder.is_relative_to(top) else ""
            if bound.isdecimal():
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                prefix = "total_" if controllers else ""
                cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                yield int(bound) - int(_lines(folder / used)[0]) + cached


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def degradations(accelerator: Accelerator) -> list[str]:
    """Return a line for each way in which the run falls short of what was asked, or possible.

    On a machine without a GPU, `accelerate launch` sets OMP_NUM_THREADS=1 if it is given neither
    a configuration file with `use_cpu` nor a number of threads.
    """
    device, environment = accelerator.device, os.environ
    lines = settings.unused(environment)
    for variable, kind in settings.SHARDED.items():
        if settings.is_true(environment.get(variable)) and accelerator.distributed_type != kind:
            lines.append(
                f"{kind} needs accelerators: nothing is sharded ({variable} has no effect)"
            )
    if precision(accelerator) != accelerator.mixed_precision:
        lines.append("CPUs have no fp16: training in fp32")
    elif precision(accelerator) == "bf16" and not computes_in_bf16(device):
        factor = SLOWER_IN_BF16 if device.type == "cpu" else ""
        lines.append(
            f"{device_name(device)} has no bf16: training in it is slower than in fp32{factor}"
        )
    compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if compiled and device.type == "cuda" and accelerator.mixed_precision == "no":
        lines.append("Accelerate multiplies fp32 matrices in TF32 where it compiles the model")
    cores = num_cores()
    alone = device.type == "cpu" and accelerator.num_processes == 1
    if alone and torch.get_num_threads() == 1 and cores > 1:
        lines.append(
            f"training with 1 thread on {cores} cores: unset OMP_NUM_THREADS, or give accelerate "
            "launch --config_file accelerate_configs/cpu.yaml"
        )
    return lines
