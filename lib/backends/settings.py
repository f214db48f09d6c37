"""Settings of Accelerate's launcher: refused where this script does not honor them.

`accelerate launch` hands its configuration file on as environment variables. Imports nothing
heavy, as it is read before the slow imports.
"""

import ctypes
import platform
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from lib.errors import InputError

TRUE = ("1", "true", "yes", "y", "t", "on")
FALSE = ("0", "false", "no", "n", "f", "off", "none", "")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
PRECISIONS = ("no", "bf16", "fp16")
FSDP = "ACCELERATE_USE_FSDP"
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
# What each of them makes Accelerate's `distributed_type`.
SHARDED = {FSDP: "FSDP", DEEPSPEED: "DEEPSPEED"}


class Setting(NamedTuple):
    """A variable of the launcher, and the values of it that pass.

    Attributes:
        key: of Accelerate's configuration file.
        honored: in lower case.
        remedy: completes "Accelerate's <key>: <value> ...".
        within: the variable that has to be true, or this one is not read.
        default: what Accelerate takes where the variable is not set.
    """

    variable: str
    key: str
    honored: tuple[str, ...]
    remedy: str
    within: str | None = None
    default: str = ""


# What would change the results, or end in a traceback.
REFUSED = (
    Setting(
        "ACCELERATE_USE_SAGEMAKER",
        "compute_environment",
        FALSE,
        "runs on Amazon SageMaker, where this script was never run: use LOCAL_MACHINE",
    ),
    Setting(
        "ACCELERATE_USE_MEGATRON_LM",
        "distributed_type",
        FALSE,
        "is Megatron-LM, which has its own model and loop: use accelerate_configs/fsdp2.yaml",
    ),
    Setting(
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "parallelism_config",
        FALSE,
        "splits the layers or the rows of the model, which this script does not do: leave it out, "
        "and shard the weights with accelerate_configs/fsdp2.yaml",
    ),
    Setting(
        "ACCELERATE_IN_TPU_POD",
        "tpu_use_cluster",
        FALSE,
        "starts a pod of TPU hosts, where this script was never run: set it to false",
    ),
    Setting(
        "ACCELERATE_DYNAMO_BACKEND",
        "dynamo_backend",
        ("no", "eager", "aot_eager", "inductor"),
        "was never run with this script: use inductor",
        default="no",
    ),
    Setting(
        "FSDP_VERSION",
        "fsdp_version",
        ("2",),
        "was never run with this script: set fsdp_version: 2",
        within=FSDP,
        default="1",
    ),
    Setting(
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_activation_checkpointing",
        FALSE,
        "recomputes the activations with other dropout masks: set it to false, and give "
        "--gradient_checkpointing",
        within=FSDP,
    ),
    Setting(
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
        "fsdp_activation_checkpointing_offload",
        FALSE,
        "needs fsdp_activation_checkpointing, which this script refuses: set it to false",
        within=FSDP,
    ),
    Setting(
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "fsdp_cpu_ram_efficient_loading",
        FALSE,
        "gives the new classifier wrong weights: set it to false (Accelerate's default is true)",
        within=FSDP,
    ),
    Setting(
        "FSDP_OFFLOAD_PARAMS",
        "fsdp_offload_params",
        FALSE,
        "was never run with this script: set it to false; --gradient_checkpointing saves memory",
        within=FSDP,
    ),
    Setting(
        "FSDP_AUTO_WRAP_POLICY",
        "fsdp_auto_wrap_policy",
        ("transformer_based_wrap", "no_wrap"),
        "fails on lists of layers, which BERT has: set it to TRANSFORMER_BASED_WRAP",
        within=FSDP,
        default="no_wrap",
    ),
    Setting(
        "FSDP_RESHARD_AFTER_FORWARD",
        "fsdp_reshard_after_forward",
        TRUE + FALSE,
        "is a strategy of FSDP1: set it to true or false",
        within=FSDP,
        default="true",
    ),
    Setting(
        "FSDP_IGNORED_MODULES",
        "fsdp_ignored_modules",
        FALSE,
        "leaves the gradients of those modules unreduced: leave it out",
        within=FSDP,
    ),
    Setting(
        "FSDP_STATE_DICT_TYPE",
        "fsdp_state_dict_type",
        ("full_state_dict", "sharded_state_dict"),
        "is for FSDP1: leave it out",
        within=FSDP,
        default="full_state_dict",
    ),
)

# What users may believe to be active, and is not. No result depends on it.
UNUSED = (
    Setting(
        "FSDP_STATE_DICT_TYPE",
        "fsdp_state_dict_type",
        ("full_state_dict",),
        "is not used: checkpoints hold whole tensors, with which any number of processes resumes",
        within=FSDP,
        default="full_state_dict",
    ),
    Setting(
        "FSDP_SHARDING_STRATEGY",
        "fsdp_sharding_strategy",
        ("full_shard", "1"),
        "is not used by FSDP2: see fsdp_reshard_after_forward",
        within=FSDP,
        default="full_shard",
    ),
    Setting(
        "FSDP_BACKWARD_PREFETCH",
        "fsdp_backward_prefetch",
        ("no_prefetch", *FALSE),
        "is not used by FSDP2",
        within=FSDP,
    ),
    Setting(
        "FSDP_FORWARD_PREFETCH",
        "fsdp_forward_prefetch",
        FALSE,
        "is not used by FSDP2",
        within=FSDP,
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_ZERO3_INIT",
        "zero3_init_flag",
        FALSE,
        "is for ZeRO-3, and not used",
        within=DEEPSPEED,
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        "zero3_save_16bit_model",
        FALSE,
        "is for ZeRO-3, and not used",
        within=DEEPSPEED,
    ),
)

# How each MPI tells its processes how many they are.
MPI_WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check(environment: Mapping[str, str], accumulation: int | None) -> None:
    """Refuse the settings of Accelerate's launcher that this script does not honor.

    DeepSpeed's own are in `deepspeed.check_settings`.

    Args:
        environment: of the process.
        accumulation: --gradient_accumulation_steps, or None if not given.

    Raises:
        InputError: one of them is set; the message names ours.
    """
    _check_precision(environment.get(MIXED_PRECISION, "no"))
    for line in _dishonored(environment, REFUSED):
        raise InputError(line)
    if not is_true(environment.get(DEEPSPEED)):
        _check_accumulation(
            environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), accumulation or 1
        )
    _check_processes(environment)


def use_precision(environment: MutableMapping[str, str], wanted: str | None) -> None:
    """Ask Accelerate for a mixed precision, as its launcher does; "auto" is asked for later.

    "no" in the environment is what the launcher sets where it was told nothing, and its
    questionnaire writes it to every file: there is no telling it from a wish.

    Raises:
        InputError: the launcher was told another.
    """
    told = environment.get(MIXED_PRECISION, "no")
    if wanted is None or told == wanted:
        return
    if told != "no":
        raise InputError(
            f"--mixed_precision {wanted} contradicts accelerate launch --mixed_precision {told} "
            f"({MIXED_PRECISION}): leave one of them out"
        )
    if wanted != "auto":  # which needs PyTorch and all processes: `resolve_precision`
        environment[MIXED_PRECISION] = wanted


def tune_cpu(environment: MutableMapping[str, str]) -> None:
    """Set how threads wait and what happens to freed memory; a user's own values win.

    Before PyTorch is imported, whose OpenMP reads it then.
    """
    # At the end of each operator the threads wait for one another. libgomp's spin 300,000 times
    # first (its manual, GOMP_SPINCOUNT), and keep the core from the one that is waited for where
    # another program takes one.
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    _keep_freed_memory(environment)


def _keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Keep glibc from giving freed memory back, so that updates need fewer new pages."""
    chosen = "GLIBC_TUNABLES" in environment or any(
        name.startswith("MALLOC_") for name in environment
    )
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def unused(environment: Mapping[str, str]) -> list[str]:
    """Return a line for each setting that is set and has no effect."""
    return _dishonored(environment, UNUSED)


def is_true(value: str | None) -> bool:
    """Read a flag as Accelerate does."""
    return (value or "").lower() in TRUE


def use_own_device(environment: MutableMapping[str, str]) -> None:
    """Set LOCAL_RANK to 0 where this process sees only one device, its own.

    So it is under Slurm with `--gpus-per-task=1`. DDP and NCCL take the local rank for the number
    of a device.
    """
    for variable in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        devices = [device for device in environment.get(variable, "").split(",") if device]
        if len(devices) == 1 and int(environment.get("LOCAL_RANK", "0")) > 0:
            environment["LOCAL_RANK"] = "0"


def _dishonored(environment: Mapping[str, str], settings: tuple[Setting, ...]) -> list[str]:
    lines = []
    for variable, key, honored, remedy, within, default in settings:
        value = environment.get(variable, default)
        active = within is None or is_true(environment.get(within))
        if active and value.lower() not in honored:
            lines.append(f"Accelerate's {key}: {value} ({variable}) {remedy}")
    return lines


def _check_precision(value: str) -> None:
    """Accelerate runs fp32 for a name that it does not know, such as BF16 in capitals."""
    if value not in PRECISIONS:
        raise InputError(
            f"Accelerate's mixed_precision: {value} ({MIXED_PRECISION}) is none of no, bf16 and "
            "fp16, in which this script runs: set bf16"
        )


def _check_accumulation(value: str, ours: int) -> None:
    if value not in ("1", str(ours)):
        raise InputError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {value}, and --gradient_accumulation_steps "
            f"{ours}: unset the variable, the flag decides"
        )


def _check_processes(environment: Mapping[str, str]) -> None:
    """Refuse one process where several were asked for, and several that cannot meet."""
    if "WORLD_SIZE" in environment:
        return  # `collectives.check_world` compares it with the processes that met
    # Only the launcher of one process sets a mode and no rank; with a port it was asked for more.
    if "ACCELERATE_DYNAMO_MODE" in environment and "MASTER_PORT" in environment:
        raise InputError(
            "accelerate launch was asked for several processes (MASTER_PORT), but starts only one "
            "for this distributed_type: use accelerate_configs/multi_cpu.yaml on CPUs, "
            "multi_gpu.yaml on GPUs; if one is meant, set num_processes: 1 and unset MASTER_PORT"
        )
    for variable in MPI_WORLD_SIZES:
        if int(environment.get(variable, "1")) > 1:
            raise InputError(
                f"mpirun started {environment[variable]} processes ({variable}), which do not see "
                "each other: use accelerate_configs/multi_cpu.yaml, or srun (slurm/)"
            )
