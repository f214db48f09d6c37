"""A process is gone: the others end soon and name it, and a restart resumes by itself."""

import os
import signal
import socket
import subprocess

import pytest
from conftest import arguments_of, assert_same_run, last_update, start_script, wait_for, workers
from machines import start_two, two_machines

from lib.distributed.heartbeat import lost_message

pytestmark = pytest.mark.processes


def test_names_a_killed_process(long_flags, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    processes = start_two(arguments_of(long_flags, folder), log)
    wait_for(lambda: last_update(folder) > 20)
    processes[1].kill()
    processes[1].wait()
    assert processes[0].wait(60) == 1
    printed = log.read_text()
    assert printed.count(f"error: lost rank 1 ({socket.gethostname()})") == 1


def test_a_silent_process_counts_as_lost(long_flags, tmp_path):
    """Stopped, it neither answers nor closes its connections, like one behind a cut link."""
    folder, log = tmp_path / "out", tmp_path / "log"
    processes = start_two([*arguments_of(long_flags, folder), "--peer_timeout=6"], log)
    wait_for(lambda: last_update(folder) > 20)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == 1
    finally:
        processes[1].kill()
        processes[1].wait()
    printed = log.read_text()
    assert f"error: {lost_message([f'rank 1 ({socket.gethostname()})'])}" in printed
    assert "silent for 6 s" in printed


def test_max_restarts_resumes_from_the_newest_checkpoint(long_flags, whole, tmp_path):
    """After the death of rank 0, and of rank 1."""
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments_of(long_flags, folder), "--overwrite_output_dir"]
    launcher = start_script(arguments, num_processes=2, log=log, options=["--max_restarts=2"])
    for rank, number in enumerate((40, 120)):
        wait_for(lambda: last_update(folder) > number)  # noqa: B023
        os.kill(workers(launcher.pid)[rank], signal.SIGKILL)
    assert launcher.wait(120) == 0, log.read_text()
    assert log.read_text().count("resuming from") == 2
    assert_same_run(folder, whole(2, 1), "step_210")


@pytest.fixture
def machines():
    with two_machines() as names:
        yield names


def test_a_cut_link_between_two_machines_ends_both_sides(long_flags, whole, machines, tmp_path):
    """Each side names the other; with the link back, the same command finishes the run."""
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments_of(long_flags, folder), "--peer_timeout=6"]
    processes = start_two(arguments, log, machines=machines)
    wait_for(lambda: last_update(folder) > 20)
    subprocess.run(["ip", "-n", machines[1], "link", "set", "veth0", "down"], check=True)
    assert [process.wait(60) for process in processes] == [1, 1]
    printed = log.read_text()
    for rank in (0, 1):
        assert f"lost rank {rank}" in printed
    subprocess.run(["ip", "-n", machines[1], "link", "set", "veth0", "up"], check=True)
    processes = start_two(arguments, log, machines=machines)
    assert [process.wait(120) for process in processes] == [0, 0]
    assert_same_run(folder, whole(2, 1), "step_210")
