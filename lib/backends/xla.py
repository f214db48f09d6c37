"""TPUs through torch_xla: the launcher's imports, objects between processes, and precision.

Imports nothing heavy, as the script imports it before it reads the flags.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import TypeVar

from lib.errors import InputError

Value = TypeVar("Value")

# Each turns every fp32 tensor into bf16. For `mixed_precision: bf16` on TPUs Accelerate sets one.
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


def configure() -> None:
    """Prepare this process, before its model is loaded.

    Raises:
        InputError: a setting would silently turn the weights and moments into bf16.
    """
    import torch
    from accelerate.utils import is_torch_xla_available

    from lib.backends.devices import build_every_mask

    _check_precision(on_tpu=is_torch_xla_available(check_is_tpu=True))
    # As other launchers set them: the first process of a host prints for all.
    rank = os.environ.get("PJRT_LOCAL_PROCESS_RANK")
    if rank is not None:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    # Weights move to the device as they are; else shared ones (T5, BART) would come apart there.
    torch.__future__.set_swap_module_params_on_conversion(True)
    build_every_mask()


def _check_precision(*, on_tpu: bool) -> None:
    asked = {name: os.environ.get(name, "0") for name in DOWNCASTS}
    found = [f"{name} is {value}" for name, value in asked.items() if value not in ("", "0")]
    if on_tpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        found.append("mixed_precision is bf16")
    if found:
        raise InputError(
            f"{found[0]}: on TPUs weights and moments would be bf16, and small updates lost; set "
            "mixed_precision to 'no' as accelerate_configs/tpu.yaml does (TPUs multiply fp32 "
            "weights in bf16), and unset the variable"
        )


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
