"""A process is gone: the others end soon and name it, and a restart resumes by itself."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    SCRIPT,
    arguments_of,
    assert_same_run,
    last_update,
    start_script,
    wait_for,
    workers,
)

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
    """Two network namespaces that a virtual cable connects."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("network namespaces need iproute2's ip, and root")
    names = [f"mrpc{os.getpid()}{letter}" for letter in "ab"]
    steps = [["ip", "netns", "add", name] for name in names]
    steps.append(["ip", "link", "add", "veth0", "netns", names[0], "type", "veth",
                  "peer", "name", "veth0", "netns", names[1]])  # fmt: skip
    for number, name in enumerate(names, start=1):
        inside = ["ip", "-n", name]
        steps.append([*inside, "addr", "add", f"10.97.0.{number}/24", "dev", "veth0"])
        steps.append([*inside, "link", "set", "veth0", "up"])
        steps.append([*inside, "link", "set", "lo", "up"])
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


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


def start_two(arguments, log, machines=None):
    """Start two processes without a launcher, as srun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        inside = ["ip", "netns", "exec", machines[rank]] if machines else []
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "10.97.0.1" if machines else "127.0.0.1",
            "MASTER_PORT": str(port),
            **({"GLOO_SOCKET_IFNAME": "veth0"} if machines else {}),
        }
        with log.open("a") as file:
            processes.append(
                subprocess.Popen(
                    [*inside, sys.executable, "-u", str(SCRIPT), *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes
