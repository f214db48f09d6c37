"""Signals to real processes, at any moment, and processes that are killed without warning."""

import json
import os
import random
import re
import signal
import time
from typing import NamedTuple

import pytest
from conftest import (
    ROOT,
    arguments_of,
    assert_same_run,
    kill_all,
    last_update,
    run_script,
    start_script,
    wait_for,
    workers,
)
from runs import file_size_limit

pytestmark = pytest.mark.processes

NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "2"))


class Stop(NamedTuple):
    """How a start ended: `status` is that of status.json, None without an output folder."""

    exit_status: int
    printed: str
    status: dict | None
    saved: bool


class Restarted:
    """A run that the same command starts again and again, with one log."""

    def __init__(self, arguments, folder, log, num_processes=1):
        self.arguments, self.folder, self.log = arguments, folder, log
        self.num_processes = num_processes
        log.touch()

    def stop(self, moment, send, *more):
        """Start the run, wait for a moment, and send signals.

        Args:
            moment: called with the process, what this start has printed and the update before it.
            send: called with the process.
        """
        length, first = self.log.stat().st_size, last_update(self.folder)
        process = start_script(
            [*self.arguments, *more], num_processes=self.num_processes, log=self.log
        )
        wait_for(lambda: moment(self, process, self.log.read_text()[length:], first))
        send(process)
        exit_status = process.wait(60)
        status = None
        if self.folder.exists():
            status = json.loads((self.folder / "status.json").read_text())
        saved = status and (self.folder / f"step_{status['update']}" / "manifest.json").exists()
        return Stop(exit_status, self.log.read_text()[length:], status, bool(saved))

    def finish(self):
        """Run to the end."""
        done = run_script(self.arguments, num_processes=self.num_processes)
        assert done.returncode == 0, done.stderr


def listens(pid):
    """Return whether the process handles SIGUSR1, which kills it until then."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


def starting(run, process, printed, first):
    if run.num_processes == 1:
        return listens(process.pid)
    ranks = workers(process.pid)
    return len(ranks) == run.num_processes and listens(ranks[1])


def resuming(run, process, printed, first):
    return "resuming from" in printed


def training(run, process, printed, first):
    return last_update(run.folder) > first + 8


def evaluating(run, process, printed, first):
    """Return whether the last line is that of an update with an evaluation."""
    update = last_update(run.folder)
    return update > first and update % 60 == 0


def writing(run, process, printed, first):
    return any(run.folder.glob(".step_*.writing"))


def to_process(name):
    def send(process):
        for _ in range(3):  # the second and the third change nothing
            process.send_signal(signal.Signals[name])
            time.sleep(0.01)

    return send


def to_group(name):
    """As Slurm sends it under proctrack/linuxproc."""
    return lambda process: os.killpg(process.pid, signal.Signals[name])


READERS = "--dataloader_num_workers=2"  # which the signals would kill

# In this order, of one run.
STOPS = {
    "SIGTERM at start-up": (starting, to_process("SIGTERM")),
    "SIGTERM to all, training": (training, to_group("SIGTERM"), READERS),
    "SIGTERM, resuming": (resuming, to_process("SIGTERM")),
    "SIGTERM, evaluating": (evaluating, to_process("SIGTERM")),
    "SIGINT, training": (training, to_process("SIGINT")),
    "SIGINT to all, training": (training, to_group("SIGINT"), READERS),
    "SIGTERM, writing": (writing, to_process("SIGTERM")),
    "SIGUSR1 to all, training": (training, to_group("SIGUSR1"), READERS),
}


@pytest.fixture(scope="module")
def stopped(long_flags, tmp_path_factory):
    """A run that was stopped at all moments and killed once, and how its starts ended."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Restarted(arguments_of(long_flags, folder / "out"), folder / "out", folder / "log")
    stops = {name: run.stop(*how) for name, how in STOPS.items()}
    killed(run.arguments, 1, run.log, seconds=0.2)
    run.finish()
    return run.folder, stops


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_ends_the_run_in_order(stopped, name):
    stop = stopped[1][name]
    assert stop.exit_status == 75, stop.printed
    signal_name = name.split()[0].rstrip(",")
    assert stop.printed.count("stopped by") == 1
    assert f"stopped by {signal_name}" in stop.printed
    assert "Traceback" not in stop.printed
    if "start-up" in name:
        assert stop.status is None
    else:
        assert stop.status["status"] == "preempted"
        assert f"after update {stop.status['update']} of 210" in stop.printed
        assert stop.saved


def test_the_same_command_finishes_with_the_same_bits(stopped, whole):
    assert_same_run(stopped[0], whole(1, 1), "step_210")


def to_ranks(name, *, ranks):
    def send(process):
        for pid in workers(process.pid)[ranks]:
            os.kill(pid, signal.Signals[name])

    return send


# Of one run on two processes.
STOPS_OF_TWO = {
    "rank 1 at start-up": (starting, to_ranks("SIGUSR1", ranks=slice(1, 2))),
    "rank 1": (training, to_ranks("SIGTERM", ranks=slice(1, 2))),
    "all": (training, to_ranks("SIGTERM", ranks=slice(0, 2))),
    "rank 1, writing": (writing, to_ranks("SIGTERM", ranks=slice(1, 2))),
    "launcher": (training, lambda process: process.send_signal(signal.SIGTERM)),
}


@pytest.fixture(scope="module")
def beside_training():
    """Checkpoints are written while training goes on, whatever the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "end_to_end" / "many_cores"))
        yield


@pytest.fixture(scope="module")
def two_stopped(long_flags, tmp_path_factory, beside_training):
    """The same for a run on two processes, each update of two micro-batches."""
    folder = tmp_path_factory.mktemp("two_stopped")
    arguments = arguments_of(long_flags, folder / "out", accumulation=2)
    run = Restarted(arguments, folder / "out", folder / "log", num_processes=2)
    stops = {who: run.stop(*how) for who, how in STOPS_OF_TWO.items()}
    killed(run.arguments, 2, run.log, seconds=0.2)
    killed_writing(run)
    run.finish()
    return run.folder, stops


@pytest.mark.parametrize("who", STOPS_OF_TWO)
def test_a_signal_to_one_of_two_processes_stops_both(two_stopped, who):
    stop = two_stopped[1][who]
    assert stop.exit_status != 0
    if "start-up" in who:
        assert stop.printed.count("stopped by SIGUSR1 before the first update") == 1
    else:
        assert stop.printed.count("train_mrpc.py: stopped by SIGTERM after update") == 1
        assert stop.status["status"] == "preempted"


def test_the_same_command_on_two_processes_finishes_with_the_same_bits(two_stopped, whole):
    assert_same_run(two_stopped[0], whole(2, 2), "step_210")


# The other two are killed above, among their signals.
COMBINATIONS = [(1, 2), (2, 1)]
if "TORTURE_KILLS" in os.environ:
    COMBINATIONS += [(1, 1), (2, 2)]


@pytest.mark.parametrize(("num_processes", "accumulation"), COMBINATIONS)
def test_killed_anywhere_the_result_is_the_same(
    long_flags, whole, tmp_path, num_processes, accumulation
):
    """SIGKILL to all processes at random moments, then the same command until the run ends."""
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
        assert not list(folder.glob(".*.train_mrpc.*")), "something half written is left"


def killed(arguments, num_processes, log, *, seconds):
    """Kill a run `seconds` after it begins to train; return False if it ended before."""
    length = log.stat().st_size if log.exists() else 0
    process = start_script(arguments, num_processes=num_processes, log=log)
    trains = re.compile(r"^update \d|resuming from|starting from", re.MULTILINE)
    # Starting up takes seconds, in which there is little to lose.
    wait_for(lambda: trains.search(log.read_text()[length:]) or process.poll() is not None)
    time.sleep(seconds)
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return False
    kill_all(process, num_processes)
    return True


def killed_writing(run):
    """Kill a run while the checkpoint that it writes beside the training is not complete."""
    length, first = run.log.stat().st_size, last_update(run.folder)
    process = start_script(run.arguments, num_processes=run.num_processes, log=run.log)
    wait_for(lambda: writing(run, process, run.log.read_text()[length:], first))
    kill_all(process, run.num_processes)


def test_a_full_disk_beside_the_training_ends_all_processes(beside_training, long_flags, tmp_path):
    arguments = [*arguments_of(long_flags, tmp_path), "--eval_every=1000"]
    with file_size_limit(64 * 1024):
        done = run_script(arguments, num_processes=2)
    assert done.returncode != 0
    assert done.stderr.count("train_mrpc.py: error: cannot write") == 1
    assert "ulimit -f" in done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert not list(tmp_path.glob("step_*"))
