"""Jobs of a real Slurm that are preempted, warned, or lose their node, and finish by themselves."""

import json
import os
import signal
import subprocess

import pytest
from conftest import ROOT, assert_same_run, run_script, wait_for
from slurm_cluster import running

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module", params=["linuxproc", "pgid"])
def cluster(request):
    """How a site tracks processes decides which of them are signalled."""
    with running(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def long_flags(flags, dropout_bert):
    """Long enough to be interrupted: some seconds of training, a checkpoint every now and then."""
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
    """The same run, undisturbed; of one process in fp32 and of two in bf16."""
    folder = tmp_path_factory.mktemp("whole")
    for num_processes, precision in ((1, "no"), (1, "bf16"), (2, "bf16")):
        done = run_script(
            [*long_flags, f"--output_dir={folder / f'{num_processes}-{precision}'}"],
            num_processes=num_processes,
            environment={"ACCELERATE_MIXED_PRECISION": precision},
        )
        assert done.returncode == 0, done.stderr
    return folder


def status(folder):
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {"status": "none", "update": 0}


def training(folder, number=20):
    """Whether the run has logged an update after the first so many."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return False
    return bool(lines) and json.loads(lines[-1])["update"] > number


def assert_finished(cluster, number, folder, reference):
    cluster.wait(number, "COMPLETED")
    assert status(folder)["status"] == "finished"
    assert_same_run(folder, reference, "step_420")
    assert not cluster.leftovers(number)


def test_a_job_that_is_preempted(cluster, long_flags, whole, tmp_path):
    """A job of the high partition takes the node away; our tasks get SIGTERM, then 5 s."""
    folder, log = tmp_path / "out", tmp_path / "log"
    number = cluster.submit(
        "cpu.sbatch", log, "--nodelist=node1", "--exclusive", "--cpus-per-task=1",
        arguments=[*long_flags, f"--output_dir={folder}", "--report_to=wandb"],
    )  # fmt: skip
    wait_for(lambda: training(folder))
    other = tmp_path / "other.sbatch"
    other.write_text("#!/bin/bash\nsleep 3\n")
    cluster.submit(
        str(other), tmp_path / "other.log", "--partition=high", "--nodelist=node1",
        "--exclusive", arguments=[],
    )  # fmt: skip
    wait_for(lambda: status(folder)["status"] == "preempted")
    assert_finished(cluster, number, folder, whole / "1-no")
    assert cluster.job(number)["Restarts"] == "1"
    printed = log.read_text()
    assert "stopped by SIGTERM after update" in printed
    assert "resuming from" in printed
    starts = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(starts) == 2
    assert {name.rpartition("-")[2] for name in starts} == {
        (folder / "wandb_run_id").read_text().strip()
    }


def test_a_job_that_reaches_its_warning(cluster, long_flags, whole, tmp_path):
    """As --signal=B:USR1@120 gives it, to the batch script only."""
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*long_flags, f"--output_dir={folder}"]
    number = cluster.submit("single_gpu.sbatch", log, arguments=arguments)
    wait_for(lambda: training(folder))
    cluster.command("scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: status(folder)["status"] == "preempted")
    assert_finished(cluster, number, folder, whole / "1-bf16")
    assert "stopped by SIGUSR1 after update" in log.read_text()


def test_a_node_goes_down(cluster, long_flags, whole, tmp_path):
    """Nobody is warned; the two processes start again from the newest checkpoint."""
    folder, log = tmp_path / "out", tmp_path / "log"
    cluster.environment["ACCELERATE_USE_CPU"] = "true"
    try:
        arguments = [*long_flags, f"--output_dir={folder}"]
        number = cluster.submit("multi_node.sbatch", log, arguments=arguments)
    finally:
        del cluster.environment["ACCELERATE_USE_CPU"]
    wait_for(lambda: training(folder, 80))
    cluster.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    wait_for(lambda: cluster.job(number)["Restarts"] == "1")
    cluster.resume("node2")
    assert_finished(cluster, number, folder, whole / "2-bf16")
    assert "resuming from" in log.read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"].startswith("2 x CPU")


def test_an_element_of_an_array_is_requeued(cluster, long_flags, tmp_path):
    """Each seed has a folder of its own, and only the one that was stopped starts again."""
    cluster.environment["OUTPUT"] = str(tmp_path / "seeds")
    try:
        array = cluster.submit(
            "seeds_array.sbatch", tmp_path / "log-%a", "--array=1-2", arguments=long_flags
        )
    finally:
        del cluster.environment["OUTPUT"]
    first, second = (tmp_path / "seeds" / f"seed_{seed}" for seed in (1, 2))
    wait_for(lambda: training(first))
    number = cluster.job(f"{array}_1")["JobId"]
    cluster.command("scancel", "--signal=TERM", number)
    wait_for(lambda: status(first)["status"] == "preempted")
    for element in (f"{array}_1", f"{array}_2"):
        cluster.wait(element, "COMPLETED")
    assert [status(folder)["status"] for folder in (first, second)] == ["finished"] * 2
    assert cluster.job(f"{array}_1")["Restarts"] == "1"
    assert cluster.job(f"{array}_2")["Restarts"] == "0"
    undisturbed = tmp_path / "undisturbed"
    assert run_script([*long_flags, "--seed=1", f"--output_dir={undisturbed}"]).returncode == 0
    assert_same_run(first, undisturbed, "step_420")


def test_tasks_that_do_not_see_each_other_are_refused(cluster, long_flags, tmp_path):
    """Two tasks without rank and address would be two whole trainings into one folder."""
    log = tmp_path / "log"
    arguments = [*long_flags, f"--output_dir={tmp_path / 'out'}"]
    number = cluster.submit("cpu.sbatch", log, "--ntasks=2", arguments=arguments)
    job = cluster.wait(number, "FAILED")
    assert job["ExitCode"] == "2:0"
    assert "they do not see each other" in log.read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("warns", "queued"), [(True, True), (False, False)])
def test_a_task_that_dies_of_its_warning_is_queued_again(tmp_path, warns, queued):
    """Warned before Python runs; one that is killed for another reason is not queued again."""
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_ask_for_what_they_need(path):
    text = path.read_text()
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@"):
        assert f"#SBATCH {option}" in text
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
