"""Checkpoints that are written while training goes on."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import safetensors.torch
from conftest import assert_same_run, last_update
from runs import error_line, run, run_and_exit, run_until

from lib.checkpoints import manifest
from lib.checkpoints.run_folder import FolderLock, RunFolder
from lib.distributed.signals import Signals
from lib.distributed.stop_signal import StopSignal
from lib.errors import InputError

EVERY_THREE = ["--checkpointing_steps=3", "--eval_every=3"]
SAVE_FILE = "lib.checkpoints.checkpoint.save_file"


@pytest.fixture
def idle_core(monkeypatch):
    monkeypatch.setattr("lib.backends.devices.leaves_a_core", lambda _: True)


@pytest.fixture(scope="module")
def waiting(flags, tmp_path_factory):
    """A run that waits for its checkpoints."""
    folder = tmp_path_factory.mktemp("waiting")
    with mock.patch("lib.backends.devices.leaves_a_core", return_value=False):
        run(flags, folder, *EVERY_THREE)
    return folder


def test_writes_the_same_bytes_while_training_goes_on(idle_core, flags, waiting, tmp_path):
    updates = []

    def slow(tensors, path):
        while path.parent.name.startswith(".step_3") and last_update(tmp_path) < 5:
            time.sleep(0.01)
        safetensors.torch.save_file(tensors, path)
        updates.append(last_update(tmp_path))

    with mock.patch(SAVE_FILE, slow):
        run(flags, tmp_path, *EVERY_THREE)
    assert len(updates) == 4
    assert min(updates) >= 5
    for name in ("step_3", "step_6"):
        for file in ("model.safetensors", "optimizer.safetensors", "best_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (waiting / name / file).read_bytes()
        manifest.verify(tmp_path / name)
    source = f"--resume_from_checkpoint={tmp_path / 'step_3'}"
    run(flags, tmp_path / "resumed", source, *EVERY_THREE)
    assert_same_run(tmp_path / "resumed", waiting, "step_6")


def test_a_failure_to_write_ends_the_run_before_the_next_checkpoint(
    idle_core, flags, tmp_path, capsys
):
    full = OSError(errno.ENOSPC, "No space left on device", "the file")
    more = ["--checkpointing_steps=100", "--eval_every=1000", "--num_train_epochs=40"]
    with mock.patch(SAVE_FILE, side_effect=full):
        assert run_and_exit(flags, tmp_path, *more) == 2
    error = error_line(capsys.readouterr().err)
    assert "cannot write the file: No space left on device; free some space" in error
    assert 100 <= last_update(tmp_path) < 200
    assert not list(tmp_path.glob("*step_*"))


def test_a_signal_during_a_write_leaves_both_checkpoints(idle_core, flags, tmp_path):
    def slow(*arguments):
        time.sleep(0.2)
        safetensors.torch.save_file(*arguments)

    with mock.patch(SAVE_FILE, slow):
        run_until(flags, tmp_path, 5, "--checkpointing_steps=3")
    assert sorted(manifest.owned(tmp_path)) == [tmp_path / "step_3", tmp_path / "step_4"]
    assert manifest.verify(tmp_path / "step_3")["update"] == 3
    assert manifest.newest(tmp_path)[0][1]["update"] == 4


def test_waits_where_a_copy_would_take_the_memory(idle_core, flags, waiting, tmp_path, capsys):
    with mock.patch("lib.backends.devices.free_memory", return_value=500_000):
        run(flags, tmp_path, *EVERY_THREE)
    assert (
        capsys.readouterr().err.count("training waits while checkpoints are written: a copy") == 1
    )
    assert_same_run(tmp_path, waiting, "step_6")


def test_keeps_the_lock_until_the_write_is_done(tmp_path, capsys):
    """And says what else the run loses, where it ends with an error of its own."""

    def write():
        time.sleep(0.2)
        with pytest.raises(InputError, match="in use by another run"):
            FolderLock(tmp_path).acquire(seconds=0)
        written.append(True)
        raise InputError("the disk is full")

    written = []
    folder = RunFolder(str(tmp_path), overwrite=False, resume_from=None)
    folder.lock.acquire(seconds=0)
    folder.pending = ThreadPoolExecutor().submit(write)
    folder.__exit__(RuntimeError, RuntimeError(), None)
    assert written == [True]
    assert "the last checkpoint is missing: the disk is full" in capsys.readouterr().err


def test_an_error_in_a_thread_goes_before_a_signal():
    accelerator = SimpleNamespace(
        num_processes=1, distributed_type="NO", device=SimpleNamespace(type="cpu"),
        is_main_process=True,
    )  # fmt: skip
    signals = Signals()
    stop = StopSignal(signals, accelerator)
    stop.check()
    signals.received = 15
    stop.fail(InputError("the disk is full"))
    with (
        mock.patch("lib.distributed.collectives.gather", lambda _, value: [value]),
        pytest.raises(InputError, match="the disk is full"),
    ):
        stop.check()
