"""The doctor names what would stop a job on this machine, with the remedy."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from lib import doctor


@pytest.fixture
def report(monkeypatch, tmp_path, capsys, flags):
    """Run the doctor on a small job in this environment: its lines by subject, and its status."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "ACCELERATE_", "MASTER_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def examine(*more, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status = doctor.main([*flags, f"--output_dir={tmp_path / 'out'}", *more])
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        assert status == any(word == "FAIL" for word, _, _ in lines)
        return {subject: (word, text) for word, subject, text in lines}

    return examine


def test_a_healthy_machine(report, tmp_path):
    lines = report()
    assert {word for word, _ in lines.values()} <= {"ok", "note"}
    assert [*lines] == [
        "versions", "accelerate", "hub", "accelerators", "processes", "precision", "threads",
        "launcher", "HF_HOME", "HF_DATASETS_CACHE", "wandb", "output", "/dev/shm",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())  # nothing was left behind


@pytest.mark.processes
def test_takes_less_than_ten_seconds_and_the_flags_of_the_script(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "lib.doctor", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    before = os.times()
    done = run("--demo", f"--output_dir={tmp_path}", "--report_to=wandb")
    assert done.returncode == 0, done.stdout
    after = os.times()  # the processor's, as other tests run beside this one
    assert after.children_user + after.children_system - sum(before[2:4]) < 10
    bad = run("--seeed=1")
    assert (bad.returncode, bad.stderr.count("unknown flag --seeed")) == (2, 1)


def test_a_cache_that_cannot_be_written(report):
    word, text = report(HF_HOME="/proc/nowhere")["HF_HOME"]
    assert word == "FAIL"
    assert "set HF_HOME to another folder" in text


def test_an_output_folder_that_cannot_be_written(report):
    assert report("--output_dir=/proc/nowhere")["output"][0] == "FAIL"


def test_a_full_disk(report, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    word, text = report()["output"]
    assert word == "FAIL"
    assert "free some space" in text


def test_offline_without_a_cache(report):
    word, text = report("--model_name_or_path=nobody/nothing", HF_HUB_OFFLINE="1")["hub"]
    assert word == "FAIL"
    assert "run the same command with --prefetch on a machine with network" in text


@pytest.mark.parametrize(
    ("environment", "word", "words"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "FAIL", "set ACCELERATE_USE_CPU=true"),
        ({"SLURM_NTASKS": "2", "ACCELERATE_USE_CPU": "1"}, "FAIL", "slurm/multi_node.sbatch"),
        (
            {"SLURM_NTASKS": "2", "ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "node1"},
            "ok",
            "2, which meet at node1",
        ),
    ],
)
def test_processes_that_do_not_see_each_other(report, environment, word, words):
    found, text = report(**environment)["processes"]
    assert found == word
    assert words in text


def test_more_processes_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    asked = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "node1"}
    assert "start one for each GPU" in doctor.processes(asked).text
    # Inside a task, one GPU may be all that Slurm lets it see.
    assert doctor.processes({**asked, "SLURM_STEP_ID": "0"}).word == "ok"


def test_precisions_that_this_machine_lacks(report, monkeypatch):
    word, text = report(ACCELERATE_MIXED_PRECISION="fp16")["precision"]
    assert (word, "CPUs have no fp16" in text) == ("note", True)
    monkeypatch.setattr("lib.backends.devices.computes_in_bf16", lambda _: False)
    assert report(ACCELERATE_MIXED_PRECISION="fp16")["precision"][1].endswith("instead; set no")
    assert doctor.precision("auto") == ("ok", "precision", "fp32")
    word, text = report(ACCELERATE_MIXED_PRECISION="bf16")["precision"]
    assert (word, "emulates it, slowly: set no" in text) == ("note", True)
    word, text = report(ACCELERATE_MIXED_PRECISION="fp8")["accelerate"]
    assert (word, "set bf16" in text) == ("FAIL", True)


@pytest.mark.parametrize(
    ("installed", "word", "words"),
    [
        ("1.13.1", "FAIL", "torch 1.13.1 (tested: 2.13.0) is old: pip install -r requirements.txt"),
        (None, "FAIL", "torch is not installed"),
        ("2.99.0", "note", "not those tested: torch 2.99.0"),
        ("2.13.0+cpu", "ok", "as tested"),
    ],
)
def test_other_versions(monkeypatch, installed, word, words):
    version = importlib.metadata.version

    def of(name):
        if name != "torch":
            return version(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", of)
    found = doctor.versions(doctor.REQUIREMENTS)
    assert found.word == word
    assert words in found.text


def test_wandb_online_without_a_key_or_a_server(report, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = ("--report_to=wandb", "--wandb_mode=online")
    word, text = report(*online)["wandb"]
    assert (word, "no API key" in text) == ("note", True)
    word, text = report(*online, WANDB_API_KEY="k" * 40, WANDB_BASE_URL="http://127.0.0.1:9")[
        "wandb"
    ]
    assert (word, "does not answer" in text) == ("note", True)
    assert report("--report_to=wandb", "--wandb_mode=offline")["wandb"] == ("ok", "offline")


def test_a_launcher_that_passes_no_signals_on(report):
    lines = report(ACCELERATE_DYNAMO_MODE="default")
    assert lines["launcher"][0] == "note"
    assert "use python train_mrpc.py" in lines["launcher"][1]


def test_too_many_threads(report, monkeypatch):
    monkeypatch.setattr(doctor, "_num_cores", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    word, text = report(LOCAL_WORLD_SIZE="2")["threads"]
    assert (word, "set OMP_NUM_THREADS=2" in text) == ("note", True)


def test_little_shared_memory(report, monkeypatch):
    def usage(folder):
        free = 60_000_000 if str(folder) == "/dev/shm" else 10**12
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    word, text = report("--dataloader_num_workers=2")["/dev/shm"]
    assert (word, "--shm-size=1g" in text) == ("note", True)


def test_one_task_of_each_machine_reports(report, capsys):
    """The main process everything, the first of another machine what is wrong there."""
    assert report(SLURM_PROCID="3", SLURM_LOCALID="1") == {}
    assert report(SLURM_PROCID="2", SLURM_LOCALID="0") == {}
    lines = report(SLURM_PROCID="2", SLURM_LOCALID="0", HF_HOME="/proc/nowhere")
    assert [*lines] == ["HF_HOME"]
