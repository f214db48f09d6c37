"""The command of a finished run, given again."""

import json
import os
import shutil

import pytest
import yaml
from runs import run

from lib.cli.parsing import parse_arguments
from lib.cli.startup import exit_if_finished
from lib.finished import FILES, finished_lines
from lib.tracking.trackers import Trackers

# What a damaged or incomplete folder lacks, of all that a run leaves.
WRITTEN = (
    *FILES,
    "all_results.json",
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "predictions/validation.jsonl",
    "report/data.json",
    "status.json",
)


@pytest.fixture(scope="module")
def rows(files, tmp_path_factory):
    """A folder of training rows in two files."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("train", "test"):
        shutil.copy(files[name], folder / f"{name}.csv")
    return folder


@pytest.fixture(scope="module")
def arguments(flags, rows):
    """Updates of 8 rows on each process, instead of 8 over all."""
    own = [f"--train_file={rows}", "--max_train_steps=2", "--per_device_train_batch_size=8"]
    return [*(flag for flag in flags if not flag.startswith("--train_batch_size")), *own]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    run(arguments, folder, report=True)
    return folder


@pytest.fixture
def again(arguments, trained, tmp_path):
    """Give the command again for a copy of the finished run: True if it ends at once."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    (folder / "config.yaml").touch()  # another test may have touched the rows

    def give(*more, output_dir=folder):
        config = parse_arguments([*arguments, *more, f"--output_dir={output_dir}"])
        try:
            exit_if_finished(config, finished_lines)
        except SystemExit as left:
            return left.code == 0
        return False

    give.folder = folder
    return give


def contents(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_command_prints_the_results_and_writes_nothing(again, capsys, monkeypatch):
    before = contents(again.folder)
    assert again()
    first, *scores, model, report = capsys.readouterr().out.splitlines()
    assert f"{again.folder} holds this run, finished at update 2: nothing to do" in first
    assert [line.split()[:2] for line in scores] == [
        ["validation", "accuracy"],
        ["validation", "f1"],
        ["validation", "combined_score"],
        ["validation", "loss"],
    ]
    assert model == f"best model, of update 2: {again.folder}"
    assert report == f"report: {again.folder}/report/index.html"
    assert contents(again.folder) == before
    monkeypatch.setenv("RANK", "1")
    assert again()
    assert capsys.readouterr().out == "", "another process prints"


@pytest.mark.parametrize(
    "more",
    [
        "--seed=1",  # refused
        "--max_train_steps=3",  # trains on
        "--per_device_eval_batch_size=7",
        "--max_predict_samples=1",
        "--save_only_model",
        "--overwrite_output_dir",
        "--dry_run",
        "--push_to_hub",
        "--bf16",
    ],
)
def test_another_command_is_not_done(again, more):
    assert not again(more)


def test_a_named_checkpoint_is_resumed_from(again):
    assert again("--resume_from_checkpoint=auto")
    assert not again(f"--resume_from_checkpoint={again.folder / 'epoch_0'}")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_missing_or_cut_off_is_made_again(again, name):
    path = again.folder / name
    if name not in FILES:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert not again()
    path.unlink()
    assert not again()


def test_missing_predictions_for_the_test_rows_are_made_again(again):
    path = again.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["num_rows"]["test"] = 3
    path.write_text(json.dumps(manifest))
    assert not again()
    (again.folder / "predictions" / "test.jsonl").touch()
    assert again()


def test_several_machines_do_not_decide_by_files_that_each_sees(again, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for here, decided in (("1", False), ("2", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert again("--train_batch_size=8") is decided


def test_a_run_is_finished_once_its_trackers_are(flags, tmp_path, monkeypatch):
    """One that is killed while they upload is resumed."""
    seen = []
    end = Trackers.finish

    def noted(trackers, **options):
        seen.append(json.loads((tmp_path / "status.json").read_text())["status"])
        end(trackers, **options)

    monkeypatch.setattr(Trackers, "finish", noted)
    run(flags, tmp_path, "--max_train_steps=1")
    assert seen[0] == "running"


def test_a_run_that_did_not_finish_goes_on(again, tmp_path):
    path = again.folder / "status.json"
    path.write_text(path.read_text().replace("finished", "preempted"))
    assert not again()
    assert not again(output_dir=tmp_path / "new")


@pytest.mark.parametrize("change", ["edit", "replace", "add", "remove"])
def test_rows_that_may_have_changed_are_read(again, rows, tmp_path, change):
    """A file that is copied to the place of another may be older than the run."""
    path, added = rows / "test.csv", rows / "more.csv"
    old = shutil.copy(path, tmp_path / "old.csv")
    os.utime(old, (0, 0))
    assert again()
    if change == "edit":
        path.write_text(path.read_text())
    elif change == "remove":
        path.unlink()
    else:
        os.replace(shutil.copy2(old, tmp_path / "new.csv"), path if change == "replace" else added)
    noticed = not again()
    added.unlink(missing_ok=True)
    shutil.copy(old, path)
    assert noticed


def test_an_environment_that_makes_another_run_is_noticed(again, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of 8 rows each: a global batch of 16
    assert not again()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not again()


def test_a_run_keeps_to_its_commits(again):
    path = again.folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model_revision": "a" * 40}))
    assert again()
    assert again(f"--model_revision={'a' * 40}")
    assert not again(f"--model_revision={'b' * 40}")


def test_auto_keeps_the_precision_of_the_run(again):
    assert again("--mixed_precision=auto")
    path = again.folder / "config.yaml"
    changed = yaml.safe_load(path.read_text()) | {"mixed_precision": "bf16"}
    path.write_text(yaml.safe_dump(changed))
    assert again("--mixed_precision=auto")
    assert not again()
