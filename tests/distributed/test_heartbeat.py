"""What the heartbeat tells each process about the others, and what it asks of the store."""

import socket
import time

import pytest
from torch.distributed import HashStore

from benchmarks.heartbeat import count_requests
from lib.distributed import heartbeat
from lib.distributed.heartbeat import NEWS_BEATS, Heartbeat

BEAT = 0.05


@pytest.fixture
def hearts(monkeypatch):
    """Those of four ranks, of which nobody is ever lost for good."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", BEAT)
    store = HashStore()
    for rank in range(4):
        store.set(f"host_{rank}", "not yet there")
    started = [Heartbeat(store, rank, 4, peer_timeout=3600) for rank in range(4)]
    yield started
    for heart in started:
        heart.close()


@pytest.mark.parametrize("num_ranks", [2, 32, 512])
def test_the_store_has_two_requests_a_beat_from_each_process(num_ranks):
    """And one more from rank 0, which alone asks for the beats of all."""
    counts = count_requests(num_ranks)
    assert counts == {"requests": 2 * num_ranks + 1, "keys": 3 * num_ranks}


def kill(heart):
    """Stop its beat without a word."""
    heart.stopped.set()
    heart.beat_thread.join()


@pytest.mark.parametrize("killed", [(2,), (1, 3), (0,)])
def test_all_learn_who_is_silent(hearts, killed):
    time.sleep(4 * BEAT)
    for rank in killed:
        kill(hearts[rank])
    time.sleep(NEWS_BEATS * BEAT)
    alive = [rank for rank in range(4) if rank not in killed]
    for rank in alive:
        assert hearts[rank].silent(heartbeat.SILENT_BEATS * BEAT) == list(killed), rank
        assert hearts[rank].first_alive() == alive[0]
        assert not hearts[rank].over()


@pytest.mark.parametrize("gone", [0, 2])
def test_a_process_that_ends_cleanly_is_over_and_not_lost(hearts, gone):
    time.sleep(4 * BEAT)
    hearts[gone].close()
    others = [heart for heart in hearts if heart.rank != gone]
    assert [heart.lost() for heart in others] == [[], [], []]
    assert all(heart.over() for heart in others)


def test_names_a_lost_process_with_its_machine(hearts):
    kill(hearts[3])
    assert hearts[1].lost() == ["rank 3 (not yet there)"]
