"""The simulation of batching schemes, at toy size."""

import numpy as np
import pytest
from transformers.trainer_pt_utils import BatchRebalanceSampler

from benchmarks import batches

LENGTHS = batches.log_normal(np.random.default_rng(0), 300)


def rows_of(updates):
    return sorted(int(row) for update in updates for part in update for row in part)


def test_figures_by_hand():
    # Two updates of two processes, a row each: 2 and 4 tokens, then 6 and 6.
    lengths = np.array([2, 4, 6, 6])
    updates = [[np.array([0]), np.array([1])], [np.array([2]), np.array([3])]]
    found = batches.figures(lengths, updates)
    assert found == pytest.approx(
        {
            "slowest": (4 / 3 + 1) / 2,
            "slowest_p90": 1 + 0.9 * (4 / 3 - 1),  # between the two, at 90%
            "slowest_cost": (2 * 4.016 / (2.004 + 4.016) + 1) / 2,  # tokens x (1 + length / 1000)
            "padding": 0,
            "waited": (4 + 6) * 2 / 18,
            "position": 4 / np.sqrt(4.5 * 4),  # of the ranks 1, 2, 3.5, 3.5 and 1.5, 1.5, 3.5, 3.5
            "clustered": 1 / (4.5 / 4),  # mean ranks 1.5 and 3.5
        }
    )
    # On one process, the rows of 2 and 4 are padded to 8 tokens.
    alone = batches.figures(lengths, [[np.array([0, 1])], [np.array([2, 3])]])
    assert (alone["slowest"], alone["padding"]) == (1, pytest.approx(1 - 18 / 20))


@pytest.mark.parametrize("scheme", list(batches.SCHEMES))
def test_schemes_use_every_row(scheme):
    """Ours once; those that give every process as many batches may repeat some."""
    updates = batches.SCHEMES[scheme](LENGTHS, 0, 4, 8)
    rows = rows_of(updates)
    assert set(rows) == set(range(300))
    assert {len(update) for update in updates} == {4}
    if scheme.startswith("this script"):
        assert len(rows) == 300
    # 300 rows at 32 are 10 updates, as Trainer makes them.
    assert len(updates) == 10


def test_rebalanced_micro_batches_are_those_of_each_rank():
    updates = batches.batch_rebalance(LENGTHS, 1, 4, 8)
    for rank in range(4):
        sampler = BatchRebalanceSampler(LENGTHS.tolist(), 32, 4, 1, rank=rank, drop_last=False)
        sampler.set_epoch(1)
        assert [update[rank].tolist() for update in updates] == list(sampler)


def test_the_table_and_the_picture(tmp_path, capsys):
    batches.main(
        [
            *("--processes", "2", "4", "--shown", "4", "--rows_per_process=4", "--rows=200"),
            *("--epochs=1", f"--plot={tmp_path / 'batches.png'}"),
        ]
    )
    said, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert said == "On 4 processes:"
    assert len(lines) == 3 * len(batches.SCHEMES)  # no MRPC without its data
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert (tmp_path / "batches.png").stat().st_size > 10_000
