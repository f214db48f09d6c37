"""How the processes of a run meet, and how they notice that one of them is gone."""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed
from accelerate.utils import is_torch_xla_available
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lib.errors import InputError, LostProcessError, NonFiniteError

# A process says this often that it lives.
BEAT_SECONDS = 1.0


@contextlib.contextmanager
def joined(peer_timeout: float) -> Iterator[None]:
    """Form the group of the processes that a launcher started, if this one is not alone.

    Accelerate would form it too, but two things need it formed here. Restarted processes must not
    read the addresses of the last attempt, so each attempt has its own names in the store. And a
    process that is cut off says nothing, for half an hour with PyTorch's time-out: the heartbeat
    names it.

    Args:
        peer_timeout: seconds without a sign of life after which a process counts as lost.

    Raises:
        LostProcessError: the work failed because another process is gone.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    backend = _backend()
    if num_processes == 1 or "RANK" not in os.environ or backend is None:
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {num_processes}, but {' and '.join(missing)} not set: the processes "
            "need the address and a port of the first to meet"
        )
    rank = int(os.environ["RANK"])
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # Under torchrun and accelerate launch their agent keeps the store.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(keep=rank == 0 and not agents)
    torch.distributed.init_process_group(
        backend, store=PrefixStore(attempt, store), rank=rank, world_size=num_processes
    )
    # A connection of its own: one that waits for a key would keep the other from beating.
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
            sys.exit(1)  # another process has said why it ended, or says who is lost
        raise LostProcessError(lost_message(lost)) from error
    finally:
        heartbeat.close()


def _connect(*, keep: bool = False, timeout: float = 300.0) -> TCPStore:
    """Connect to the store of the run; `keep` it in this process."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=keep,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _backend() -> str | None:
    """gloo between processors, and the device's own between devices, such as NCCL for CUDA.

    None where Accelerate has no group of PyTorch's: on TPUs, and without a device unless it is told
    to use the processors.
    """
    if is_torch_xla_available():
        return None
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y"):
        return "gloo"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"


class Heartbeat:
    """Tells the others that this process lives, and watches whether they do.

    A process that waits for a lost one in a reduction cannot be woken, so when one is silent for
    `peer_timeout` seconds a thread says which, and ends this process with status 1. Another thread
    talks to the store, where it may wait for ever if the link is cut.
    """

    def __init__(self, store: Store, rank: int, num_processes: int, peer_timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.num_processes = num_processes
        self.peer_timeout = peer_timeout
        self.stopped = threading.Event()
        # For each process: what it last said, and when that was new.
        self.seen = {other: ("", time.monotonic()) for other in range(num_processes)}
        self.store_answered = time.monotonic()
        store.set(f"host_{rank}", socket.gethostname())
        self.names = {
            other: f"rank {other} ({store.get(f'host_{other}').decode()})"
            for other in range(num_processes)
        }
        self.beating = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self.beating.start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def close(self) -> None:
        """The run is over, and from now on silence is no loss."""
        self.stopped.set()
        self.beating.join(4 * BEAT_SECONDS)
        if self.beating.is_alive():
            return  # the store does not answer
        # The process that keeps the store may have left first.
        with contextlib.suppress(DistError):
            self.store.set(f"beat_{self.rank}", "over")

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have said nothing new for so long, and had not finished."""
        now = time.monotonic()
        silent = [
            other
            for other, (said, since) in self.seen.items()
            if other != self.rank and said != "over" and now - since > seconds
        ]
        # Without the store nobody is heard. It is kept by rank 0, or by a launcher beside it.
        return silent[:1] if now - self.store_answered > seconds else silent

    def lost(self) -> list[str]:
        """After a reduction failed: names of the processes that are gone, if any is."""
        time.sleep(4 * BEAT_SECONDS)
        return [self.names[other] for other in self.silent(3 * BEAT_SECONDS)]

    def over(self) -> bool:
        """Whether a process has ended in order."""
        return any(said == "over" for said, _ in self.seen.values())

    def first_alive(self) -> int:
        """The lowest rank that still beats."""
        silent = self.silent(3 * BEAT_SECONDS)
        return min(rank for rank in self.seen if rank not in silent)

    def _beat(self) -> None:
        number = 0
        while not self.stopped.wait(BEAT_SECONDS):
            number += 1
            # `store_answered` tells how long it has failed.
            with contextlib.suppress(DistError):
                self.store.set(f"beat_{self.rank}", str(number))
                self._listen()
                self.store_answered = time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            silent = self.silent(self.peer_timeout)
            if silent:
                message = lost_message([self.names[other] for other in silent])
                print(
                    f"train_mrpc.py: error: {message} (silent for {self.peer_timeout:g} s)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def _listen(self) -> None:
        for other in range(self.num_processes):
            if not self.store.check([f"beat_{other}"]):
                continue
            said = self.store.get(f"beat_{other}").decode()
            if said != self.seen[other][0]:
                self.seen[other] = (said, time.monotonic())


def lost_message(names: list[str]) -> str:
    return (
        f"lost {', '.join(names)}: killed, out of memory, or cut off; run the same command again "
        "and it goes on from the newest checkpoint"
    )
