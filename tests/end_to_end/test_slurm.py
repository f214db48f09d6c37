"""Jobs of a real Slurm that are preempted, warned or lose their node finish by themselves."""

import json
import os
import re
import signal
import subprocess
from unittest import mock

import pytest
from conftest import ROOT, assert_same_run, last_update, run_script, wait_for
from runs import run
from slurm_cluster import LINUXPROC_NODE, PGID_NODE, running

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def cluster():
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def long_flags(flags, dropout_bert):
    """Long enough to be interrupted: some seconds of training with a few checkpoints."""
    return [
        *flags,
        f"--model_name_or_path={dropout_bert}",
        "--num_train_epochs=60",
        "--eval_every=60",
        "--checkpointing_steps=60",
        "--checkpoints_to_keep=1",
        "--logging_steps=20",
    ]


@pytest.fixture(scope="module")
def whole(long_flags, tmp_path_factory):
    """The same run, uninterrupted; on one process in fp32 and bf16, on two in bf16."""
    folder = tmp_path_factory.mktemp("whole")
    run(long_flags, folder / "1-no")
    for num_processes in (1, 2):
        done = run_script(
            [*long_flags, f"--output_dir={folder / f'{num_processes}-bf16'}"],
            num_processes=num_processes,
            environment={"ACCELERATE_MIXED_PRECISION": "bf16"},
        )
        assert done.returncode == 0, done.stderr
    return folder


def read_status(folder):
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {"status": "none", "update": 0}


def trains(folder, *, after=20):
    """Return whether the run has logged an update after the first so many."""
    return last_update(folder) > after


def assert_finished(cluster, number, folder, reference):
    cluster.wait(number, "COMPLETED")
    assert read_status(folder)["status"] == "finished"
    assert_same_run(folder, reference, "step_420")
    wait_for(lambda: not cluster.leftovers(number), seconds=30)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "node", "reference"),
    [("cpu.sbatch", LINUXPROC_NODE, "1-no"), ("single_gpu.sbatch", PGID_NODE, "1-bf16")],
    ids=["linuxproc", "pgid"],
)
def test_a_job_that_is_preempted_and_warned(
    cluster, long_flags, whole, tmp_path, script, node, reference
):
    """Whichever way the site tracks processes, which decides which of them are signalled.

    A job of the high partition takes the node away: our tasks get SIGTERM, then 5 s. Later the
    batch script alone gets the warning of --signal=B:USR1@120.
    """
    folder, log = tmp_path / "out", tmp_path / "log"
    number = cluster.submit(
        script, log, f"--nodelist={node}", "--exclusive", "--cpus-per-task=1",
        arguments=[*long_flags, f"--output_dir={folder}", "--report_to=wandb"],
    )  # fmt: skip
    wait_for(lambda: trains(folder))
    other = tmp_path / "other.sbatch"
    other.write_text("#!/bin/bash\nsleep 3\n")
    cluster.submit(
        str(other), tmp_path / "other.log", "--partition=high", f"--nodelist={node}",
        "--exclusive", arguments=[],
    )  # fmt: skip
    wait_for(lambda: read_status(folder)["status"] == "preempted")
    first = read_status(folder)["update"]
    wait_for(lambda: trains(folder, after=first + 20), seconds=180)
    cluster.command("scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: read_status(folder)["status"] == "preempted")
    assert_finished(cluster, number, folder, whole / reference)
    assert cluster.job(number)["Restarts"] == "2"
    printed = log.read_text()
    assert "stopped by SIGTERM after update" in printed
    assert "stopped by SIGUSR1 after update" in printed
    assert printed.count("resuming from") == 2
    starts = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(starts) == 3
    assert {name.rpartition("-")[2] for name in starts} == {
        (folder / "wandb_run_id").read_text().strip()
    }


@pytest.mark.processes
def test_a_node_goes_down(cluster, long_flags, whole, tmp_path):
    """Without a warning; the two processes start again from the newest checkpoint."""
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*long_flags, f"--output_dir={folder}"]
    with mock.patch.dict(cluster.environment, ACCELERATE_USE_CPU="true"):
        number = cluster.submit("multi_node.sbatch", log, arguments=arguments)
    wait_for(lambda: trains(folder, after=80))
    cluster.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    wait_for(lambda: cluster.job(number)["Restarts"] == "1")
    cluster.resume("node2")
    assert_finished(cluster, number, folder, whole / "2-bf16")
    assert "resuming from" in log.read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"].startswith("2 x CPU")


@pytest.mark.processes
def test_a_configuration_of_accelerate(cluster, long_flags, tmp_path):
    """FSDP2 on two nodes; the warning to the batch script stops the tasks, and they go on."""
    folder, log = tmp_path / "out", tmp_path / "log"
    variables = {
        "ACCELERATE_USE_CPU": "true",
        "CONFIG_FILE": "accelerate_configs/fsdp2.yaml",
        "PYTHONPATH": str(ROOT / "tests" / "end_to_end" / "fsdp_tasks"),
    }
    arguments = [*long_flags, "--num_train_epochs=20", f"--output_dir={folder}"]
    with mock.patch.dict(cluster.environment, variables):
        number = cluster.submit("multi_node.sbatch", log, arguments=arguments)
    wait_for(lambda: trains(folder))
    cluster.command("scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: read_status(folder)["status"] == "preempted")
    cluster.wait(number, "COMPLETED")
    assert read_status(folder)["status"] == "finished"
    assert cluster.job(number)["Restarts"] == "1"
    printed = log.read_text()
    assert "stopped by SIGUSR1 after update" in printed
    assert printed.count("resuming from") == 1
    # The doctor reads the file as well, at each start.
    assert len(re.findall(r"^ok +precision +bf16$", printed, re.MULTILINE)) == 2
    # By each of two tasks, at each of two starts.
    assert printed.count("sharded: 41 of 41 parameters") == 4
    assert json.loads((folder / "manifest.json").read_text())["precision"] == "bf16"
    wait_for(lambda: not cluster.leftovers(number), seconds=30)


@pytest.mark.processes
def test_an_element_of_an_array_is_requeued(cluster, long_flags, whole, tmp_path):
    """Each seed has its own folder, and only the one that was stopped starts again."""
    with mock.patch.dict(cluster.environment, OUTPUT=str(tmp_path / "seeds")):
        array = cluster.submit(
            "seeds_array.sbatch", tmp_path / "log-%a", "--array=42-43", arguments=long_flags
        )
    first, second = (tmp_path / "seeds" / f"seed_{seed}" for seed in (42, 43))
    wait_for(lambda: trains(first))
    number = cluster.job(f"{array}_42")["JobId"]
    cluster.command("scancel", "--signal=TERM", number)
    wait_for(lambda: read_status(first)["status"] == "preempted")
    for element in (f"{array}_42", f"{array}_43"):
        cluster.wait(element, "COMPLETED")
    assert [read_status(folder)["status"] for folder in (first, second)] == ["finished"] * 2
    assert cluster.job(f"{array}_42")["Restarts"] == "1"
    assert cluster.job(f"{array}_43")["Restarts"] == "0"
    assert_same_run(first, whole / "1-no", "step_420")  # 42 is the default seed


@pytest.mark.processes
def test_tasks_that_do_not_see_each_other_are_rejected(cluster, long_flags, tmp_path):
    """Two tasks without rank and address would be two whole trainings into one folder."""
    log = tmp_path / "log"
    arguments = [*long_flags, f"--output_dir={tmp_path / 'out'}"]
    number = cluster.submit("cpu.sbatch", log, "--ntasks=2", arguments=arguments)
    job = cluster.wait(number, "FAILED")
    assert job["ExitCode"] == "1:0"  # the doctor's
    printed = log.read_text()
    assert "FAIL processes" in printed
    assert "they do not see each other" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("warns", "queued"), [(True, True), (False, False)])
def test_requeues_a_task_that_its_warning_kills(tmp_path, warns, queued):
    """Warned before Python runs; a task killed for another reason is not queued again."""
    signals = "USR1 $PPID" if warns else "KILL $$"
    for name, does in (("srun", f"kill -{signals}; exec sleep 20"), ("scontrol", 'echo "did $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", ". slurm/supervise.sh; supervise python"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (128 + signal.SIGUSR1 if warns else 128 + signal.SIGKILL)
    assert ("did requeue 7" in done.stdout) == queued


def test_a_warning_while_the_doctor_looks_requeues_the_job(tmp_path):
    """Slurm requeues no job that ends by itself after a warning."""
    for name, does in (("python", "kill -USR1 $PPID; exit 1"), ("scontrol", 'echo "did $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", ". slurm/supervise.sh; check python; supervise python"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.count("did requeue 7")) == (75, 1)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_ask_for_what_they_need(path):
    text = path.read_text()
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@"):
        assert f"#SBATCH {option}" in text
    assert text.index('lib.doctor "$@"\n') < text.index("\nsupervise")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
