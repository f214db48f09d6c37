"""The heartbeat of each process, by which the others notice that it is gone."""

import contextlib
import os
import socket
import sys
import threading
import time

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

# Seconds between two beats.
BEAT_SECONDS = 1.0


class Heartbeat:
    """Tells the others that this process is alive, and watches them.

    A process that waits for a lost one in a reduction cannot be woken, so when a process is silent
    for `peer_timeout` seconds a thread names it and ends this one with status 1. Another thread
    talks to the store, where it may block forever if the link is cut.
    """

    def __init__(self, store: Store, rank: int, num_processes: int, peer_timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.num_processes = num_processes
        self.peer_timeout = peer_timeout
        self.stopped = threading.Event()
        # For each rank: its last beat, and when that beat was new.
        self.seen = {other: ("", time.monotonic()) for other in range(num_processes)}
        self.store_answered = time.monotonic()
        store.set(f"host_{rank}", socket.gethostname())
        self.names = {
            other: f"rank {other} ({store.get(f'host_{other}').decode()})"
            for other in range(num_processes)
        }
        self.beat_thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self.beat_thread.start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def close(self) -> None:
        """Announce a clean exit, so that the others do not report a loss."""
        self.stopped.set()
        self.beat_thread.join(4 * BEAT_SECONDS)
        if self.beat_thread.is_alive():
            return  # blocked, as the store does not answer
        # The process that hosts the store may have left first.
        with contextlib.suppress(DistError):
            self.store.set(f"beat_{self.rank}", "over")

    def silent(self, seconds: float) -> list[int]:
        """Ranks without a new beat for `seconds`, except those that ended cleanly."""
        now = time.monotonic()
        silent = [
            other
            for other, (beat, since) in self.seen.items()
            if other != self.rank and beat != "over" and now - since > seconds
        ]
        # Without the store no beats arrive. It lives in rank 0, or in the launcher beside it.
        return silent[:1] if now - self.store_answered > seconds else silent

    def lost(self) -> list[str]:
        """Names of the processes that are gone, after a reduction failed."""
        time.sleep(4 * BEAT_SECONDS)
        return [self.names[other] for other in self.silent(3 * BEAT_SECONDS)]

    def over(self) -> bool:
        """True if any process has ended cleanly."""
        return any(beat == "over" for beat, _ in self.seen.values())

    def first_alive(self) -> int:
        """The lowest rank that still beats."""
        silent = self.silent(3 * BEAT_SECONDS)
        return min(rank for rank in self.seen if rank not in silent)

    def _beat(self) -> None:
        number = 0
        while not self.stopped.wait(BEAT_SECONDS):
            number += 1
            # The watching thread sees from `store_answered` how long this has failed.
            with contextlib.suppress(DistError):
                self.store.set(f"beat_{self.rank}", str(number))
                self._read_beats()
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

    def _read_beats(self) -> None:
        for other in range(self.num_processes):
            if not self.store.check([f"beat_{other}"]):
                continue
            beat = self.store.get(f"beat_{other}").decode()
            if beat != self.seen[other][0]:
                self.seen[other] = (beat, time.monotonic())


def lost_message(names: list[str]) -> str:
    """The line that the user reads when processes are gone."""
    return (
        f"lost {', '.join(names)}: killed, out of memory, or cut off; run the same command again "
        "to resume from the newest checkpoint"
    )
