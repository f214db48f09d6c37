"""Signals to real processes, at any moment; and processes that are killed without a word."""

import contextlib
import json
import os
import random
import re
import signal
import time

import pytest
from conftest import (
    arguments_of,
    assert_same_run,
    last_update,
    run_script,
    start_script,
    wait_for,
    workers,
)

NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "2"))


def status(folder):
    return json.loads((folder / "status.json").read_text())


def evaluating(folder):
    """Whether the last line is that of an update after which an evaluation is due."""
    return last_update(folder) > 0 and last_update(folder) % 60 == 0


def listens(pid):
    """Whether the process has taken SIGUSR1 over: until then it would die of it."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


MOMENTS = {
    "start-up": lambda folder: True,
    "training": lambda folder: last_update(folder) > 20,
    "evaluation": evaluating,
    "writing": lambda folder: any(folder.glob(".step_*.writing")),
}


@pytest.mark.parametrize(
    ("name", "moment"),
    [*(("SIGTERM", moment) for moment in MOMENTS), ("SIGINT", "training"), ("SIGUSR1", "training")],
)
def test_a_signal_ends_in_order_and_the_same_command_goes_on(
    long_flags, whole, tmp_path, moment, name
):
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = arguments_of(long_flags, folder)
    process = start_script(arguments, log=log)
    wait_for(lambda: listens(process.pid))
    wait_for(lambda: MOMENTS[moment](folder))
    for _ in range(3):  # the second and the third change nothing
        process.send_signal(signal.Signals[name])
        time.sleep(0.01)
    assert process.wait(60) == 75
    printed = log.read_text()
    assert printed.count("stopped by") == 1
    assert f"stopped by {name}" in printed
    assert "Traceback" not in printed
    if moment == "start-up":
        assert not folder.exists()
    else:
        stopped = status(folder)
        assert stopped["status"] == "preempted"
        assert f"after update {stopped['update']} of 210" in printed
        assert (folder / f"step_{stopped['update']}" / "manifest.json").exists()
    assert run_script(arguments).returncode == 0
    assert_same_run(folder, whole(1, 1), "step_210")


def test_a_signal_while_a_run_goes_on_leaves_what_it_found(long_flags, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = arguments_of(long_flags, folder)
    for moment in (lambda: last_update(folder) > 20, lambda: "resuming from" in log.read_text()):
        process = start_script(arguments, log=log)
        wait_for(moment)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        stopped = status(folder)
        assert stopped["status"] == "preempted"
        assert f"stopped by SIGTERM after update {stopped['update']} of 210" in log.read_text()
        assert (folder / f"step_{stopped['update']}").is_dir()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_run_that_reads_with_workers(long_flags, tmp_path, name):
    """As Slurm sends it under proctrack/linuxproc; PyTorch's workers would die of it."""
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start_script(
        [*arguments_of(long_flags, folder), "--dataloader_num_workers=2"], log=log
    )
    wait_for(lambda: last_update(folder) > 20)
    os.killpg(process.pid, signal.Signals[name])
    assert process.wait(60) == 75, log.read_text()
    assert status(folder)["status"] == "preempted"


@pytest.mark.parametrize("who", ["rank 1", "all", "launcher"])
def test_a_signal_to_one_of_two_processes_stops_both(long_flags, whole, tmp_path, who):
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = arguments_of(long_flags, folder, accumulation=2)
    launcher = start_script(arguments, num_processes=2, log=log)
    wait_for(lambda: last_update(folder) > 20)
    ranks = workers(launcher.pid)
    assert len(ranks) == 2
    told = {"rank 1": ranks[1:], "all": ranks, "launcher": [launcher.pid]}
    for pid in told[who]:
        os.kill(pid, signal.SIGTERM)
    assert launcher.wait(60) != 0
    printed = log.read_text()
    assert printed.count("train_mrpc.py: stopped by SIGTERM after update") == 1
    assert status(folder)["status"] == "preempted"
    assert run_script(arguments, num_processes=2).returncode == 0
    assert_same_run(folder, whole(2, 2), "step_210")


def test_a_signal_to_one_process_while_it_starts(long_flags, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    launcher = start_script(arguments_of(long_flags, folder), num_processes=2, log=log)
    ranks = wait_for(lambda: found if len(found := workers(launcher.pid)) == 2 else None)
    wait_for(lambda: listens(ranks[1]))
    os.kill(ranks[1], signal.SIGUSR1)
    assert launcher.wait(60) != 0
    assert log.read_text().count("stopped by SIGUSR1 before the first update") == 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_anywhere_the_result_is_the_same(
    long_flags, whole, tmp_path, num_processes, accumulation
):
    """SIGKILL to all processes at random moments; then the same command until it is done."""
    moments = random.Random(f"{num_processes} {accumulation}")
    kills = 0
    while kills < NUM_KILLS:
        folder = tmp_path / f"after {kills} kills"
        arguments = arguments_of(long_flags, folder, accumulation)
        while kills < NUM_KILLS and killed(
            arguments, num_processes, tmp_path / "log", seconds=moments.uniform(0, 2)
        ):
            kills += 1
        if kills == NUM_KILLS:
            done = run_script(arguments, num_processes=num_processes)
            assert done.returncode == 0, done.stderr
        assert_same_run(folder, whole(num_processes, accumulation), "step_210")
        assert not list(folder.glob(".*.train_mrpc.*")), "nothing half written is left"


def killed(arguments, num_processes, log, *, seconds):
    """Kill a run so many seconds after it begins to train; False if it ends before."""
    process = start_script(arguments, num_processes=num_processes, log=log)
    printed = log.stat().st_size
    trains = re.compile(r"^update \d|resuming from|starting from", re.MULTILINE)
    # Starting up takes seconds, in which there is little to lose.
    wait_for(lambda: trains.search(log.read_text()[printed:]) or process.poll() is not None)
    time.sleep(seconds)
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return False
    kill_all(process, num_processes)
    return True


def kill_all(process, num_processes):
    """As a power failure does: nobody has time for a word."""
    pids = workers(process.pid) if num_processes > 1 else []
    for pid in [process.pid, *pids]:
        with contextlib.suppress(ProcessLookupError):  # it may just have finished
            os.kill(pid, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
