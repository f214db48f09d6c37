"""What the heartbeat asks of the store, for 2 to 1,024 ranks.

    python -m benchmarks.heartbeat

Counts the requests of real heartbeats, one for each rank, on a store in memory. Measures what a
TCPStore on this machine answers: to two processes that ask as fast as they can, and to rank 0,
which reads the beats of all.
"""

import collections
import multiprocessing
import time
from collections.abc import Sequence

from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from lib.distributed.heartbeat import BEAT_SECONDS, Heartbeat

NUM_RANKS = (2, 8, 32, 128, 256, 512, 1024)
SECONDS = 3.0  # of the measurement


class CountingStore(HashStore):  # type: ignore[misc]
    """A store in memory that counts the requests, and the keys in them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter[str]()

    def count(self, num_keys: int) -> None:
        self.counts += {"requests": 1, "keys": num_keys}

    def set(self, key: str, value: str) -> None:
        self.count(1)
        super().set(key, value)

    def get(self, key: str) -> bytes:
        self.count(1)
        return super().get(key)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.count(len(keys))
        return super().multi_get(list(keys))


def count_requests(num_ranks: int) -> dict[str, int]:
    """Requests of all ranks in one beat, and the keys in them."""
    store = CountingStore()
    for rank in range(num_ranks):
        store.set(f"beat_{rank}", "0")
        store.set(f"host_{rank}", "here")
    hearts = [Heartbeat(store, rank, num_ranks, peer_timeout=3600) for rank in range(num_ranks)]
    for heart in hearts:
        heart.stopped.set()  # beat only when told
        heart.beat_thread.join()
    store.counts.clear()
    for heart in hearts:
        heart.beat()
    return dict(store.counts)


def answered(store: TCPStore) -> float:
    """Requests a second that a TCPStore answers; `get`, as nobody waits for the answer to `set`."""
    store.set("beat", "1")
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        counts = pool.map(_ask, [store.port] * 2)
    return sum(counts) / SECONDS


def _ask(port: int) -> int:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    num_requests, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        store.get("beat")
        num_requests += 1
    return num_requests


def seconds_to_read(store: TCPStore, num_ranks: int) -> float:
    """Seconds until rank 0 has the beats of all."""
    keys = [f"attempt_0_heartbeat/beat_{rank}" for rank in range(num_ranks)]
    for key in keys:
        store.set(key, "1000")
    times = []
    for _ in range(20):
        started = time.perf_counter()
        store.multi_get(keys)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def main() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    capacity = answered(store)
    print(f"A TCPStore answered {capacity:,.0f} requests/s of two processes.\n")
    header = ("ranks", "requests/s if all read all", "requests/s", "share", "rank 0 reads, ms")
    print(f"| {' | '.join(header)} |")
    print("|---|---|---|---|---|")
    for num_ranks in NUM_RANKS:
        before = num_ranks * (1 + 2 * num_ranks) / BEAT_SECONDS
        requests = count_requests(num_ranks)["requests"] / BEAT_SECONDS
        milliseconds = seconds_to_read(store, num_ranks) * 1e3
        cells = (
            f"{before:,.0f}",
            f"{requests:,.0f}",
            f"{requests / capacity:.1%}",
            f"{milliseconds:.1f}",
        )
        print(f"| {num_ranks:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
