"""Two machines that share their caches tokenize once; of those that do not, each tokenizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from machines import ADDRESS, free_port, two_machines

SLOW_MAIN = Path(__file__).parent / "slow_main.py"


def launch(machines, caches, arguments):
    """Start a launcher on each machine; return what all processes printed."""
    port = free_port()
    started = []
    for number, (machine, cache) in enumerate(zip(machines, caches, strict=True)):
        launcher = [
            "ip", "netns", "exec", machine, sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml"),
            "--num_processes=2", f"--machine_rank={number}", f"--main_process_ip={ADDRESS}",
            f"--main_process_port={port}", str(SLOW_MAIN), *arguments,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "veth0",
            "HF_DATASETS_CACHE": str(cache),
        }
        started.append(
            subprocess.Popen(
                launcher,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = "".join(process.communicate(timeout=200)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    return printed


@pytest.mark.processes
@pytest.mark.parametrize("shared", [True, False], ids=["one-cache", "a-cache-each"])
def test_who_tokenizes_on_two_machines(flags, tmp_path, shared):
    """Rank 0 takes its time; a process that does not wait for it would tokenize too.

    The slower of the two would then replace the files that the other has already mapped.
    """
    caches = [tmp_path / "cache"] * 2 if shared else [tmp_path / "one", tmp_path / "other"]
    arguments = [*flags, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=1"]
    with two_machines() as machines:
        printed = launch(machines, caches, arguments)
    # The training rows, and those of the validation split.
    assert printed.count("rank 0 tokenizes") == 2
    assert printed.count("rank 1 tokenizes") == (0 if shared else 2)
    for rank in (0, 1):
        assert f"rank {rank} maps 4 files, 0 of them deleted" in printed
