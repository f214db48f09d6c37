"""What the heartbeat tells each process about the others, and what it asks of the store."""

import types

import pytest
from torch.distributed import HashStore

from benchmarks.heartbeat import count_requests
from lib.distributed import heartbeat
from lib.distributed.heartbeat import NEWS_BEATS, SILENT_BEATS, Heartbeat


@pytest.mark.parametrize("num_ranks", [2, 32, 512])
def test_the_store_has_two_requests_a_beat_from_each_process(num_ranks):
    """And one more from rank 0, which alone asks for the beats of all."""
    counts = count_requests(num_ranks)
    assert counts == {"requests": 2 * num_ranks + 1, "keys": 3 * num_ranks}


class Ranks:
    """The heartbeats of four ranks, which beat in a given order, by a clock of their own."""

    def __init__(self, monkeypatch, order):
        self.now = 0.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.pass_beats)
        monkeypatch.setattr(heartbeat, "time", clock)
        store = HashStore()
        for rank in range(4):
            store.set(f"host_{rank}", f"node{rank}")  # those of ranks that start later
        self.hearts = [Heartbeat(store, rank, 4, peer_timeout=3600) for rank in range(4)]
        for heart in self.hearts:
            heart.stopped.set()
            heart.beat_thread.join()
        self.hearts[0].beat()  # the others wait for its first
        self.beating = [self.hearts[rank] for rank in order]
        self.pass_beats(3)

    def pass_beats(self, number):
        for _ in range(round(number)):
            self.now += 1
            for heart in self.beating:
                heart.beat()

    def kill(self, rank):
        self.beating.remove(self.hearts[rank])

    def end(self, rank):
        self.kill(rank)
        self.hearts[rank].close()


@pytest.fixture(params=["0123", "3210"], ids=["rank-0-first", "rank-0-last"])
def ranks(request, monkeypatch):
    return Ranks(monkeypatch, map(int, request.param))


@pytest.mark.parametrize("killed", [[2], [1, 3], [0]], ids=str)
def test_all_learn_who_is_lost(ranks, killed):
    for rank in killed:
        ranks.kill(rank)
    ranks.pass_beats(NEWS_BEATS)
    for heart in ranks.beating:
        assert heart.silent(SILENT_BEATS) == killed
        assert heart.first_alive() == min({0, 1, 2, 3} - {*killed})
        assert not heart.over()


def test_names_a_lost_process_and_its_machine(ranks):
    ranks.kill(3)
    assert ranks.hearts[1].lost() == ["rank 3 (node3)"]


@pytest.mark.parametrize("timeout", [5, 120])
def test_a_silent_process_is_noticed_within_three_beats_of_the_timeout(ranks, timeout):
    ranks.kill(2)
    ranks.pass_beats(timeout - 1)
    assert [heart.silent(timeout) for heart in ranks.beating] == [[], [], []]
    ranks.pass_beats(4)
    assert [heart.silent(timeout) for heart in ranks.beating] == [[2], [2], [2]]


def test_a_process_that_beats_again_is_not_silent(ranks):
    heart = ranks.hearts[2]
    ranks.kill(2)
    ranks.pass_beats(NEWS_BEATS)
    ranks.beating.append(heart)
    ranks.pass_beats(3)
    assert [heart.silent(SILENT_BEATS) for heart in ranks.hearts] == [[], [], [], []]


@pytest.mark.parametrize("ended", [0, 2])
def test_a_process_that_ends_cleanly_is_over_and_not_lost(ranks, ended):
    ranks.end(ended)
    for heart in ranks.beating:
        assert heart.lost() == []
        assert heart.over()
