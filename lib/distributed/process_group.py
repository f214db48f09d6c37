"""How the processes of a run meet."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed
from accelerate.utils import is_torch_xla_available
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lib.backends import devices, xla
from lib.distributed.heartbeat import Heartbeat, lost_message
from lib.errors import InputError, LostProcessError, NonFiniteError


@contextlib.contextmanager
def process_group(peer_timeout: float) -> Iterator[None]:
    """Initialize the process group, if a launcher started more than this process.

    Accelerate would initialize it too; it happens here for two reasons. Restarted processes must
    not read the addresses of the previous attempt, so each attempt has a prefix in the store. And
    a process that is cut off goes unnoticed for half an hour, PyTorch's timeout: the heartbeat
    names it. TPUs have no process group of PyTorch.

    Args:
        peer_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
        LostProcessError: the work failed because another process is gone.
        InputError: as `xla.configure`, or no address to meet at.
    """
    if is_torch_xla_available():
        xla.configure()
        yield
        return
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    backend = _backend()
    if backend not in (None, "gloo"):
        devices.build_every_mask()
    alone = num_processes == 1 or "RANK" not in os.environ
    if alone or backend is None or torch.distributed.is_initialized():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {num_processes}, but {' and '.join(missing)} not set: the processes "
            "need the address and a port of rank 0 to meet"
        )
    rank = int(os.environ["RANK"])
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # Under torchrun and accelerate launch the agent hosts the store.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(host=rank == 0 and not by_agent)
    torch.distributed.init_process_group(
        backend, store=PrefixStore(attempt, store), rank=rank, world_size=num_processes
    )
    # Own connection: a blocking get would stall the heartbeat.
    heart = _connect(timeout=peer_timeout)
    heartbeat = Heartbeat(
        PrefixStore(f"{attempt}_heartbeat", heart), rank, num_processes, peer_timeout
    )
    try:
        yield
    except NonFiniteError:
        raise
    except RuntimeError as error:
        lost = heartbeat.lost()
        if not lost and not heartbeat.over():
            raise
        if not lost or rank != heartbeat.first_alive():
            sys.exit(1)  # another process printed why it ended, or prints who is lost
        raise LostProcessError(lost_message(lost)) from error
    finally:
        heartbeat.close()


def _connect(*, host: bool = False, timeout: float = 300.0) -> TCPStore:
    """Connect to the store of the run, or host it in this process."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=host,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _backend() -> str | None:
    """gloo between CPUs, and the device's own between devices, such as NCCL for CUDA.

    None where Accelerate has no process group: without a device, unless told to use the CPUs.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y"):
        return "gloo"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"
