"""The heartbeat of each process, by which the others notice that it is gone."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import cast

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

# Seconds between two beats.
BEAT_SECONDS = 1.0
# Beats without news after which a process is silent. Two may pass between two reads that differ.
SILENT_BEATS = 2.5
# Beats until all know it: one until rank 0 reads the last beat, then those above, one until it
# publishes, and one until the others read that.
NEWS_BEATS = 6


class Heartbeat:
    """Tells the others that this process is alive, and watches them.

    A process that waits for a lost one in a reduction cannot be woken, so when a process is silent
    for `peer_timeout` seconds a thread names it and ends this one with status 1. Another thread
    talks to the store, where it may block forever if the link is cut.

    Rank 0 reads the beats of all and publishes who is silent; the others read only that, so that
    the store gets two requests a beat from each process, however many there are. When rank 0 is
    gone nothing is published, and the others name rank 0.
    """

    def __init__(self, store: Store, rank: int, num_processes: int, peer_timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.num_processes = num_processes
        self.peer_timeout = peer_timeout
        self.stopped = threading.Event()
        self.number = 0
        self.store_answered = time.monotonic()
        # When these ranks were last heard of: on rank 0 all, elsewhere 0 and those it finds silent.
        self.since = {0: self.store_answered}
        self.any_over = False
        self.beats = [b""] * num_processes  # as rank 0 read them last
        self.published = ""  # by rank 0, as the others read it last
        self.names = self._exchange_names()
        self.beat_thread = threading.Thread(
            target=self._keep_beating, daemon=True, name="heartbeat"
        )
        self.beat_thread.start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def beat(self) -> None:
        """Tell the others that this process is alive, and hear who is not."""
        self.number += 1
        self.store.set(f"beat_{self.rank}", str(self.number))
        if self.rank == 0:
            self._read_beats()
            self._publish()
        else:
            self._read_published()
        self.store_answered = time.monotonic()

    def close(self) -> None:
        """Announce a clean exit, so that the others do not report a loss."""
        self.stopped.set()
        self.beat_thread.join(4 * BEAT_SECONDS)
        if self.beat_thread.is_alive():
            return  # blocked, as the store does not answer
        # The process that hosts the store may have left first.
        with contextlib.suppress(DistError):
            self.store.set(f"beat_{self.rank}", "over")
            if self.rank == 0:
                self._publish(over=True)

    def silent(self, seconds: float) -> list[int]:
        """Ranks without a new beat for `seconds`, except those that ended cleanly."""
        now = time.monotonic()
        silent = [
            other
            for other, since in self.since.items()
            if other != self.rank and now - since > seconds
        ]
        # Without the store no beats arrive. It lives in rank 0, or in the launcher beside it.
        return silent[:1] if now - self.store_answered > seconds else silent

    def lost(self) -> list[str]:
        """Names of the processes that are gone, after a reduction failed."""
        time.sleep(NEWS_BEATS * BEAT_SECONDS)
        return [self.names[other] for other in self.silent(SILENT_BEATS * BEAT_SECONDS)]

    def over(self) -> bool:
        """True if any process has ended cleanly."""
        return self.any_over

    def first_alive(self) -> int:
        """The lowest rank that still beats."""
        silent = self.silent(SILENT_BEATS * BEAT_SECONDS)
        return min(rank for rank in range(self.num_processes) if rank not in silent)

    def _exchange_names(self) -> list[str]:
        """Wait for all processes; return the names of all, by rank."""
        self.store.set(f"beat_{self.rank}", "0")
        self.store.set(f"host_{self.rank}", socket.gethostname())
        if self.rank == 0:
            hosts = self.store.multi_get([f"host_{other}" for other in range(self.num_processes)])
            names = [f"rank {other} ({host.decode()})" for other, host in enumerate(hosts)]
            self.store.set("names", json.dumps(names))
        return cast(list[str], json.loads(self.store.get("names")))

    def _keep_beating(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            # The watching thread sees from `store_answered` how long this has failed.
            with contextlib.suppress(DistError):
                self.beat()

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
        beats = self.store.multi_get([f"beat_{other}" for other in range(self.num_processes)])
        now = time.monotonic()
        self.since = {
            other: self.since.get(other, now) if beat == self.beats[other] else now
            for other, beat in enumerate(beats)
            if beat != b"over"
        }
        self.any_over = b"over" in beats
        self.beats = beats

    def _publish(self, *, over: bool = False) -> None:
        """Publish which ranks are silent, and for how many seconds.

        Args:
            over: rank 0 ends cleanly.
        """
        now = time.monotonic()
        silent = {
            other: now - self.since[other] for other in self.silent(SILENT_BEATS * BEAT_SECONDS)
        }
        news = {"beat": self.number, "over": over, "any": self.any_over or over, "silent": silent}
        self.store.set("news", json.dumps(news))

    def _read_published(self) -> None:
        published = self.store.get("news").decode()
        if published == self.published:
            return  # rank 0 has not beaten since
        self.published = published
        news = json.loads(published)
        now = time.monotonic()
        since = {} if news["over"] else {0: now}
        self.since = since | {int(rank): now - age for rank, age in news["silent"].items()}
        self.any_over = news["any"]


def lost_message(names: list[str]) -> str:
    """The line that the user reads when processes are gone."""
    return (
        f"lost {', '.join(names)}: killed, out of memory, or cut off; run the same command again "
        "to resume from the newest checkpoint"
    )
