"""How the processes leave."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from machines import free_port

WORKER = """
import atexit, os, sys, time
# The last thing before Python finalizes, some seconds without letting go of the GIL.
atexit.register(sum, range(10**8))
import torch
from lib.cli.startup import exit_status
from lib.distributed.process_group import process_group
from lib.errors import InputError

rank = int(os.environ["RANK"])
with exit_status(), process_group(60.0):
    time.sleep(rank / 2)
    torch.distributed.all_reduce(torch.ones(1), async_op=True)
    if sys.argv[1] == "error":
        raise InputError("refused")
"""


@pytest.mark.processes
@pytest.mark.parametrize(("ending", "status"), [("return", 0), ("error", 2)])
def test_a_process_that_ends_during_a_collective_does_not_crash(tmp_path, ending, status):
    """gloo's thread of rank 0 releases the collective while Python is finalizing."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), ending],
            env={
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "ACCELERATE_USE_CPU": "true",
                "PYTHONPATH": str(ROOT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [status, status], printed
    assert "".join(printed).count("refused") == int(ending == "error")
