"""How the processes leave."""

import pytest
from machines import start_two

WORKER = """
import atexit, os, sys, time
# The last thing before Python finalizes, some seconds without letting go of the GIL.
atexit.register(sum, range(10**8))
sys.path.insert(0, os.getcwd())
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
    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(WORKER)
    processes = start_two([ending], log, script=script)
    assert [process.wait(60) for process in processes] == [status, status], log.read_text()
    assert log.read_text().count("refused") == int(ending == "error")
