"""A lost or full disk costs only what came after the newest checkpoint."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import read_metrics
from runs import error_line, file_size_limit, run, run_and_exit, run_until

from lib.checkpoints import manifest as manifests
from lib.checkpoints.atomic import beside, move_into_place


def test_flushes_every_file_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    """And the name afterwards: a power failure leaves the old checkpoint or the new one."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(*paths):
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    new = beside(tmp_path / "step_1")
    new.mkdir()
    for name in ("model", "optimizer"):
        (new / name).touch()
    move_into_place(tmp_path / "step_1")
    assert sorted(events[:3]) == sorted(["model", "optimizer", new.name])
    assert events[3:] == ["rename", tmp_path.name]


def test_a_file_size_limit_leaves_the_last_checkpoint_good(flags, tmp_path, capsys):
    run_until(flags, tmp_path, 4)
    with file_size_limit(64 * 1024):
        assert run_and_exit(flags, tmp_path) == 2
    error = error_line(capsys.readouterr().err)
    assert str(tmp_path) in error
    assert "ulimit -f" in error
    assert manifests.newest(tmp_path)[0][0].name == "step_3"
    run(flags, tmp_path)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 7]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_good(flags, small_disk, capsys):
    out = small_disk / "out"
    filler = small_disk / "filler"
    run_until(flags, out, 4)
    filler.write_bytes(b"x" * (free_bytes(small_disk) - 200_000))
    assert run_and_exit(flags, out) == 2
    assert "No space left on device; free some space" in error_line(capsys.readouterr().err)
    assert manifests.newest(out)[0][0].name == "step_3"
    filler.unlink()
    run(flags, out)


def free_bytes(folder):
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def test_a_folder_that_became_read_only_can_be_resumed(flags, small_disk, capsys):
    out = small_disk / "out"
    run_until(flags, out, 4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status = run_and_exit(flags, out)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert status == 2
    assert str(out) in error_line(capsys.readouterr().err)
    run(flags, out)
