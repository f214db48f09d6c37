"""Users see one line for an error, and an exit status."""

import subprocess

import pytest
from conftest import run_script
from runs import error_line, run_and_exit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate=1"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
        (["--train_batch_size=0"], "--train_batch_size must be at least 1, got 0"),
        (["--train_file=gone.csv", "--validation_file=gone.csv"], "gone.csv: no such file"),
    ],
)
def test_a_wrong_flag_ends_the_run_at_once(arguments, words):
    done = run_script(arguments)
    assert done.returncode == 2
    assert words in error_line(done.stderr)
    assert done.stdout == ""


def test_names_the_remedy_without_hub_and_cache(tmp_path):
    done = run_script([f"--output_dir={tmp_path / 'out'}"])
    assert done.returncode == 2
    line = error_line(done.stderr)
    assert "google-bert/bert-base-uncased is neither a folder nor cached" in line
    assert "run the same command with --prefetch on a machine with network" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_bad_rows_leave_no_output_folder(flags, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("sentence1,sentence2,label\na,b,0\nc,d,\n")
    files = [f"--train_file={path}", f"--validation_file={path}"]
    done = run_script([*flags, *files, f"--output_dir={tmp_path / 'out'}"])
    assert done.returncode == 2
    assert "bad.csv, row 2, column label: the label is missing" in error_line(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a configuration but not for a model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_notices_before_the_training_that_the_disk_is_too_small(flags, small_disk, capsys):
    """A checkpoint of the tiny BERT has 3 x 4 bytes for each of some 37,000 weights."""
    assert run_and_exit(flags, small_disk / "out", "--max_train_steps=1") == 2
    printed = capsys.readouterr()
    line = error_line(printed.err)
    assert f"cannot write {small_disk / 'out'}: the run needs some 0.4 MB, and 0.1 MB are" in line
    assert "free some space" in line
    assert "update 1/1" not in printed.out
    assert not (small_disk / "out" / "config.yaml").exists()


def test_a_gradient_that_is_not_finite_has_its_own_exit_status(flags, tmp_path, capsys):
    path = tmp_path / "scores.csv"
    path.write_text("text,label\n" + "a,1e30\nb,0.5\n" * 4)
    files = [f"--train_file={path}", f"--validation_file={path}"]
    assert run_and_exit(flags, tmp_path / "out", *files, "--warmup_ratio=0") == 1
    assert "update 1 is not finite" in error_line(capsys.readouterr().err)
