"""A damaged checkpoint is named and skipped, and loading one executes nothing."""

import contextlib
import json
import pickle
import shutil
import subprocess
import sys

import pytest
from conftest import SCRIPT, assert_same_run
from runs import run, run_until

from lib.checkpoints import manifest as manifests
from lib.checkpoints.atomic import REPLACED, beside
from lib.errors import InputError

CONTENTS = [
    "model.safetensors",
    "optimizer.safetensors",
    "best_model.safetensors",
    "training_state.json",
    "metrics.jsonl",
    "manifest.json",
]


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-10])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def copy_run(source, folder, *checkpoints):
    for name in checkpoints:
        shutil.copytree(source / name, folder / name)
    for name in ("config.yaml", "status.json"):
        shutil.copy(source / name, folder)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("file", CONTENTS)
def test_skips_a_damaged_checkpoint_and_names_it(
    checkpointed, two_epochs, tmp_path, capsys, file, how
):
    copy_run(checkpointed, tmp_path, "step_9", "step_12")
    damage(tmp_path / "step_12" / file, how)
    run(two_epochs, tmp_path, "--checkpointing_steps=14")
    printed = capsys.readouterr()
    assert "resuming from" in printed.out
    assert "step_9, after update 9" in printed.out
    skipped = [line for line in printed.err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 1
    assert "step_12" in skipped[0]
    assert file in skipped[0]
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_keeps_new_checkpoints_beside_a_damaged_later_one(two_epochs, checkpointed, tmp_path):
    copy_run(checkpointed, tmp_path, "step_9", "step_12")
    damage(tmp_path / "step_12" / "model.safetensors", "flipped")
    more = ["--checkpointing_steps=14", "--checkpoints_to_keep=1"]
    run_until(two_epochs, tmp_path, 5, *more)
    assert 9 < manifests.newest(tmp_path)[0][1]["update"] < 12
    run(two_epochs, tmp_path, *more)
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_finds_the_old_checkpoint_after_a_kill_between_two_renames(
    two_epochs, checkpointed, tmp_path, capsys
):
    """A checkpoint written again is moved aside before the new one gets its name."""
    copy_run(checkpointed, tmp_path, "step_9")
    (tmp_path / "step_9").rename(tmp_path / f".step_9{REPLACED}")
    shutil.copytree(checkpointed / "step_9", beside(tmp_path / "step_9"))
    run(two_epochs, tmp_path, "--checkpointing_steps=14")
    assert f"resuming from {tmp_path / 'step_9'}" in capsys.readouterr().out
    assert not list(tmp_path.glob(".step*"))
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_rejects_a_damaged_checkpoint_that_the_user_names(two_epochs, checkpointed, tmp_path):
    shutil.copytree(checkpointed / "step_9", tmp_path / "step_9")
    damage(tmp_path / "step_9" / "model.safetensors", "flipped")
    with pytest.raises(InputError, match="step_9 is damaged: model.safetensors was altered"):
        run(two_epochs, tmp_path / "out", f"--resume_from_checkpoint={tmp_path / 'step_9'}")
    assert not (tmp_path / "out").exists()


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_pickle_would_execute_code(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("matching", [True, False], ids=["manifest matches", "manifest as it was"])
@pytest.mark.parametrize("file", [*CONTENTS, "random_states_0.pkl"])
def test_loading_executes_no_code(two_epochs, checkpointed, tmp_path, file, matching):
    source = tmp_path / "step_9"
    shutil.copytree(checkpointed / "step_9", source)
    (source / file).write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    if matching and file != "manifest.json":
        manifest = json.loads((source / "manifest.json").read_text())
        del manifest["checksum"]
        (source / "manifest.json").unlink()
        manifest["files"] = manifests.file_entries(source)
        manifest["checksum"] = manifests.digest(manifest)
        (source / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--checkpointing_steps=14", f"--resume_from_checkpoint={source}"]
    with contextlib.suppress(InputError):
        run(two_epochs, tmp_path / "out", *arguments)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_holds_only_what_was_computed(checkpointed):
    names = sorted(path.name for path in (checkpointed / "step_9").iterdir())
    assert names == sorted(CONTENTS)
    manifest = json.loads((checkpointed / "step_9" / "manifest.json").read_text())
    assert manifest["update"] == 9
    assert manifest["epoch"] == pytest.approx(9 / 7)
    assert manifest["num_processes"] == 1
    assert manifest["run"]["seed"] == 42
    assert set(manifest["files"]) == {*names} - {"manifest.json"}


@pytest.mark.processes
def test_skips_a_checkpoint_without_read_permission(flags, tmp_path):
    """Also for root, who reads everything unless the capability is taken away."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, of util-linux")
    run_until(flags, tmp_path, 4)
    (tmp_path / "step_3").chmod(0)
    try:
        done = subprocess.run(
            ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
             "--inh-caps=-dac_override,-dac_read_search",
             sys.executable, str(SCRIPT), *flags, f"--output_dir={tmp_path}"],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    finally:
        (tmp_path / "step_3").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "skipped: checkpoint" in done.stderr
    assert "step_3 cannot be read" in done.stderr
    assert "starting from the beginning" in done.stdout
