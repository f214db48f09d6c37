"""The benchmark of planning and dealing, at toy size."""

import numpy as np

from benchmarks import dealing


def test_the_table_and_the_picture(tmp_path, capsys):
    dealing.main(
        ["--rows", "300", "40", "--processes", "1", "2", f"--plot={tmp_path / 'scale.png'}"]
    )
    head, _, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [["300", "1"], ["300", "2"], ["40", "1"], ["40", "2"]]
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_updates_are_those_of_the_plan():
    """300 rows at 32 are 10 updates an epoch, and number 100,000 is the first of its epoch."""
    sampler = dealing.sampler_of(np.arange(1, 301), 2)
    assert sampler.per_epoch == len(sampler.plan(0)) == 10
    assert len(dealing.deal(sampler, 2, dealing.RESUMED_AT, 10)) == 10
    assert np.array_equal(sampler.batches.order, sampler.plan(10_000).order)
