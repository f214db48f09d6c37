"""Accelerate reads each file, and those that can run without a GPU do."""

import json
import os
import socket
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPT

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launch(name, *arguments, cpu_processes=False, options=()):
    """Start the launcher as the README does; the caller waits for it."""
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS")
    if cpu_processes:
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    file = ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml")]
    return subprocess.Popen(
        [*launcher, *file, *options, str(SCRIPT), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process):
    printed, _ = process.communicate(timeout=300)
    return printed


def test_there_is_one_for_each_kind_of_machine():
    kinds = "cpu deepspeed_zero2 fsdp2 multi_cpu multi_gpu multi_node single_gpu tpu"
    assert " ".join(path.stem for path in FILES) == kinds


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    """Its own loader refuses unknown keys."""
    assert load_config_from_file(str(path)).num_processes >= 1


def test_the_loader_would_refuse_an_unknown_key(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(FILES[0].read_text() + "num_proceses: 2\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(path))


def test_cpu(flags, tmp_path):
    process = launch("cpu", *flags, f"--output_dir={tmp_path}", "--max_train_steps=2")
    printed = output_of(process)
    assert process.returncode == 0, printed
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"].startswith("1 x CPU")


def test_multi_cpu(flags, tmp_path):
    arguments = [*flags, f"--output_dir={tmp_path}", "--max_train_steps=2"]
    process = launch("multi_cpu", *arguments, cpu_processes=True)
    printed = output_of(process)
    assert process.returncode == 0, printed
    assert json.loads((tmp_path / "manifest.json").read_text())["device"].startswith("2 x CPU")


def test_two_machines(flags, tmp_path):
    """Two launchers with one process each, which meet by address and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*flags, f"--output_dir={tmp_path}", "--max_train_steps=2"]
    machines = [
        launch(
            "multi_node",
            *arguments,
            cpu_processes=True,
            options=["--num_processes=2", f"--machine_rank={rank}", f"--main_process_port={port}"],
        )
        for rank in range(2)
    ]
    printed = [output_of(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"].startswith("2 x CPU")
    assert manifest["precision"] == "bf16"


def test_several_gpus_without_a_gpu_are_refused(flags, tmp_path):
    """Accelerate would start two whole trainings into one folder."""
    process = launch(
        "multi_gpu", *flags, f"--output_dir={tmp_path / 'out'}", options=["--num_processes=2"]
    )
    printed = output_of(process)
    assert process.returncode != 0
    assert printed.count("they do not see each other") == 1
    assert not (tmp_path / "out").exists()
