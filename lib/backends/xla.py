"""TPUs through torch_xla: the launcher's imports, objects between processes, and precision.

Imports torch_xla nowhere but in functions: only TPUs have it.
"""

import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lib.errors import InputError

Value = TypeVar("Value")

# Each turns every fp32 tensor into bf16. Accelerate sets one for `mixed_precision: bf16` on TPUs.
DOWNCASTS = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")


def script_arguments(script: str) -> list[str]:
    """Return the command line from the path of `script` on; empty if the script is not in it.

    On TPUs `accelerate launch` imports the script: in the launcher, whose own options come first
    in its command line, and again in the process of each chip.
    """
    path = Path(script).resolve()
    for position, word in enumerate(sys.argv):
        if word.endswith(path.name) and Path(word).resolve() == path:
            return sys.argv[position:] if position else sys.argv
    return []


def check_precision() -> None:
    """Refuse settings that would silently turn the weights and moments into bf16.

    Raises:
        InputError: one is set.
    """
    for name in DOWNCASTS:
        value = os.environ.get(name, "0")
        if value.lower() not in ("", "0", "false"):
            raise InputError(
                f"{name} is {value}: weights and moments would be bf16, and small updates lost; "
                "unset it, and set mixed_precision to 'no' as accelerate_configs/tpu.yaml does "
                "(TPUs multiply fp32 weights in bf16)"
            )


def set_ranks() -> None:
    """Set this process's rank, as other launchers do: the first of a host prints for all."""
    rank = os.environ.get("PJRT_LOCAL_PROCESS_RANK")
    if rank is not None:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}


def build_every_mask() -> None:
    """Make transformers build an attention mask for every batch.

    It leaves out a mask that hides nothing, and reads each batch's from the device to find out.
    """
    from transformers import AttentionMaskInterface

    masks = AttentionMaskInterface()
    for name in ("sdpa", "eager"):
        AttentionMaskInterface.register(name, partial(_build_mask, masks[name]))


def _build_mask(build: Callable[..., Any], **options: Any) -> Any:
    return build(**options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def gather_object(value: Value, num_processes: int) -> list[Value]:
    """Return the values of all processes, by rank; Accelerate cannot gather objects on TPUs.

    Waits for the device. Each size of a message costs compilations: sizes are powers of two.
    """
    if num_processes == 1:
        return [value]
    import torch_xla.core.xla_model as xm

    message = pickle.dumps(value)
    padded = message.ljust(max(4096, 1 << len(message).bit_length()), b"\0")
    return [pickle.loads(received) for received in xm.rendezvous("objects", padded)]
