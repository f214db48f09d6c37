"""docs/from-a-notebook.md: its cells run as they stand, in a kernel's order."""

import os
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT
from documentation import blocks
from runs import run

from lib.tracking.progress import Progress

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the script and lib in it, where the cells may write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lib", "train_mrpc.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_cells(checkout, *cells):
    """Run cells in a kernel of their own, which cannot show windows; return what they print."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)],
        cwd=checkout,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_and_reading_what_a_run_wrote(checkout):
    train, read, _ = blocks("from-a-notebook.md", "python")
    checks = """
(accuracy,) = evaluations["eval_accuracy"]
assert abs(accuracy - results["eval_accuracy"]) < 1e-9
assert list(training["update"]) == [10, 20, 30, 40, 50, 60, 70, 75]
"""
    run_cells(checkout, train, read, checks)
    assert (checkout / "outputs" / "notebook" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes(checkout):
    *_, cell = blocks("from-a-notebook.md", "python")
    printed = run_cells(checkout, cell, 'assert results["num_updates"] == 75')
    assert "75 updates of 32 rows, 2 x CPU" in printed


def test_an_interrupted_cell_resumes(flags, tmp_path, capsys):
    """The kernel is interrupted after the second checkpoint."""
    checkpointing = "--checkpointing_steps=2"
    advance = mock.Mock(side_effect=[None] * 4 + [KeyboardInterrupt])
    with mock.patch.object(Progress, "advance", advance), pytest.raises(KeyboardInterrupt):
        run(flags, tmp_path, checkpointing)
    run(flags, tmp_path, checkpointing)
    assert f"resuming from {tmp_path / 'step_4'}" in capsys.readouterr().out
