"""Processes on two machines, which are network namespaces of this one."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT

ADDRESS = "10.97.0.1"  # of the first machine


@contextlib.contextmanager
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces that a virtual cable connects; skip where there are none."""
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_two(
    arguments: Sequence[str], log: Path, machines: Sequence[str] = (), script: Path = SCRIPT
) -> list[subprocess.Popen[bytes]]:
    """Start two processes without a launcher, as srun does."""
    port = free_port()
    processes = []
    for rank in range(2):
        inside = ["ip", "netns", "exec", machines[rank]] if machines else []
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": ADDRESS if machines else "127.0.0.1",
            "MASTER_PORT": str(port),
            **({"GLOO_SOCKET_IFNAME": "veth0"} if machines else {}),
        }
        with log.open("a") as file:
            processes.append(
                subprocess.Popen(
                    [*inside, sys.executable, "-u", str(script), *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes
