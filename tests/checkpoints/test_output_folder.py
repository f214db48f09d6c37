"""Which runs and files an output folder takes, keeps and refuses."""

import json
import shutil

import pytest
from conftest import last_update, read_metrics, read_weights, start_script, wait_for
from runs import difference, run, run_until

from lib.checkpoints.atomic import beside
from lib.errors import InputError


def test_keeps_folders_of_others(flags, tmp_path):
    run_until(flags, tmp_path, 4)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "mine.txt").write_text("mine")
    run(flags, tmp_path)
    assert (tmp_path / "step_1" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "step_notes").is_dir()
    kept = {path.name for path in tmp_path.glob("*_[0-9]*")}
    assert kept == {"step_1", "epoch_0"}, "without --checkpointing_steps only the newest is kept"


def test_cleans_up_only_its_own_temporary_folders(flags, tmp_path):
    run_until(flags, tmp_path, 4)
    for name in (".backup.old", ".notes.writing"):
        (tmp_path / name).mkdir()
    half_written = beside(tmp_path / "profile" / "updates_1_to_2.rank_0.json")
    half_written.parent.mkdir()
    half_written.touch()
    run(flags, tmp_path)
    assert (tmp_path / ".backup.old").is_dir()
    assert (tmp_path / ".notes.writing").is_dir()
    assert not half_written.exists()


@pytest.mark.processes
def test_rejects_a_folder_that_another_run_uses(two_epochs, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    more = ["--num_train_epochs=30", "--eval_every=60"]
    process = start_script([*two_epochs, *more, f"--output_dir={out}"], log=log)
    wait_for(lambda: last_update(out) > 3)
    with pytest.raises(InputError, match=rf"in use by another run \(process {process.pid} on"):
        run(two_epochs, out, *more)
    assert process.wait(200) == 0
    updates = [line["update"] for line in read_metrics(out) if "loss" in line]
    assert len(updates) == len(set(updates)) == 70


def test_does_not_replace_a_folder_in_the_way(flags, tmp_path):
    run_until(flags, tmp_path, 3)
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "epoch_0" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="epoch_0 is in the way"):
        run(flags, tmp_path)
    assert (tmp_path / "epoch_0" / "mine.txt").read_text() == "mine"


def test_overwriting_starts_over(flags, tmp_path, capsys):
    run(flags, tmp_path, "--checkpointing_steps=3", "--max_train_steps=7")
    (tmp_path / "step_5").mkdir()
    capsys.readouterr()
    run(flags, tmp_path, "--max_train_steps=1", "--seed=1", "--overwrite_output_dir")
    assert "resuming" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*_[0-9]")) == ["epoch_0", "step_5"]


def test_a_restarted_overwriting_command_resumes(flags, tmp_path, monkeypatch, capsys):
    """Slurm runs the batch script of a requeued job again, with the same flags."""
    run_until(flags, tmp_path, 4, "--overwrite_output_dir")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(flags, tmp_path, "--overwrite_output_dir")
    assert "resuming from" in capsys.readouterr().out


def test_a_restarted_command_overwrites_what_another_job_left(flags, tmp_path, monkeypatch, capsys):
    """The first start of the job ended before it claimed the folder."""
    run(flags, tmp_path, "--seed=1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    capsys.readouterr()
    run(flags, tmp_path, "--overwrite_output_dir")
    assert "resuming from" not in capsys.readouterr().out


def test_a_restarted_command_resumes_from_its_own_checkpoint(flags, tmp_path, monkeypatch, capsys):
    run_until(flags, tmp_path / "one", 3)
    (first,) = (tmp_path / "one").glob("step_*")
    named = f"--resume_from_checkpoint={first}"
    run_until(flags, tmp_path / "two", 4, named)
    (second,) = (tmp_path / "two").glob("step_*")
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(flags, tmp_path / "two", named)
    assert f"resuming from {second}" in capsys.readouterr().out


def test_repeating_the_command_keeps_a_finished_run(flags, tmp_path, capsys):
    results = run(flags, tmp_path)
    before = read_weights(tmp_path), read_metrics(tmp_path)
    assert run(flags, tmp_path) == results, "its speed too, which is that of the first start"
    assert "resuming from" in capsys.readouterr().out
    assert difference(before[0], read_weights(tmp_path)) == 0
    assert before[1] == read_metrics(tmp_path)


def test_does_not_retrain_a_finished_run_without_checkpoints(flags, tmp_path):
    run(flags, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    shutil.rmtree(tmp_path / "epoch_0")
    with pytest.raises(InputError, match="holds a finished run without its checkpoints"):
        run(flags, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_weights_only_run_resumes_and_keeps_no_checkpoint(flags, once, tmp_path, capsys):
    weights_only = "--save_only_model"
    run_until(flags, tmp_path, 4, weights_only)
    (left,) = tmp_path.glob("step_*")
    (tmp_path / "epoch_7").mkdir()
    (tmp_path / "epoch_7" / "mine.txt").write_text("mine")
    run(flags, tmp_path, weights_only)
    assert f"resuming from {left}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*_[0-9]*")} == {"epoch_7"}
    assert (tmp_path / "epoch_7" / "mine.txt").read_text() == "mine"
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
    # The best model and its predictions are those of a run that keeps its checkpoints.
    for name in ("model.safetensors", "predictions/validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (once / name).read_bytes()

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ((), ("--num_train_epochs=2",), ("--num_train_epochs=2", weights_only)):
        with pytest.raises(InputError, match=r"\(--save_only_model removed them\)"):
            run(flags, tmp_path, *more)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_checkpoints_of_a_finished_run_can_be_removed_later(flags, tmp_path):
    results = run(flags, tmp_path)
    assert run(flags, tmp_path, "--save_only_model") == results
    assert not list(tmp_path.glob("*_[0-9]*"))


def test_rejects_a_checkpoint_of_another_run_field_by_field(flags, tmp_path):
    run(flags, tmp_path / "one", "--max_train_steps=2")
    source = f"--resume_from_checkpoint={tmp_path / 'one' / 'epoch_0'}"
    with pytest.raises(InputError) as refused:
        run(flags, tmp_path / "two", "--max_train_steps=2", "--seed=1", "--weight_decay=0", source)
    for words in ("seed 42 there, 1 here", "weight_decay 0.01 there, 0.0 here", "epoch_0"):
        assert words in str(refused.value)
    assert not (tmp_path / "two").exists()


def test_rejects_changed_rows_in_moved_files(flags, files, tmp_path):
    """Files may move, but their rows may not change."""
    data = tmp_path / "data.csv"
    shutil.copy(files["train"], data)
    run_until(flags, tmp_path / "out", 3, f"--train_file={data}")
    moved = shutil.copy(data, tmp_path / "moved.csv")
    run_until(flags, tmp_path / "out", 3, f"--train_file={moved}")
    data.write_text(files["train"].read_text().replace("the", "a"))
    with pytest.raises(InputError, match="data_fingerprint '.*' there, '.*' here"):
        run(flags, tmp_path / "out", f"--train_file={data}")


def test_keeps_the_newest_and_the_best(flags, tmp_path):
    """With a learning rate of 0 the first evaluation stays the best."""
    more = ["--learning_rate=0", "--eval_every=2", "--checkpointing_steps=1"]
    run(flags, tmp_path, *more, "--checkpoints_to_keep=2")
    kept = sorted(path.name for path in tmp_path.glob("step_*"))
    assert kept == ["step_2", "step_6", "step_7"]
