"""What a checkpoint promises: complete or absent, harmless to load, and the same run goes on."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    SCRIPT,
    assert_same_run,
    last_update,
    read_metrics,
    read_weights,
    run_script,
    start_script,
    wait_for,
)
from test_training import difference, run
from transformers import AutoTokenizer, LukeConfig, LukeForSequenceClassification

from lib.checkpoints import manifest as manifests
from lib.checkpoints.atomic import REPLACED, beside
from lib.checkpoints.checkpoint import TrainingState
from lib.cli.parsing import parse_arguments
from lib.demo.corpus import MODEL_DIR
from lib.distributed.signals import Signals
from lib.errors import InputError, Preempted
from lib.training.timetable import Timetable
from train_mrpc import main

CONTENTS = [
    "model.safetensors",
    "optimizer.safetensors",
    "best_model.safetensors",
    "training_state.json",
    "metrics.jsonl",
    "manifest.json",
]


class StopAfter(Signals):
    """A signal that comes when the run has asked for it so many times."""

    def __init__(self, num_checks):
        self.left = num_checks
        self.at_once = False

    @property
    def received(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


def run_until(flags, folder, num_checks, *more):
    """A run that is told to stop at its n-th point of asking; the line that it leaves with."""
    with pytest.raises(Preempted) as stopped:
        main(parse_arguments([*flags, f"--output_dir={folder}", *more]), StopAfter(num_checks))
    return str(stopped.value)


@pytest.fixture(scope="module")
def long_flags(flags, dropout_bert):
    """Two epochs of 7 updates of two micro-batches, with dropout."""
    return [
        *flags,
        f"--model_name_or_path={dropout_bert}",
        "--num_train_epochs=2",
        "--gradient_accumulation_steps=2",
        "--logging_steps=3",
        "--per_device_eval_batch_size=8",
    ]


@pytest.fixture(scope="module")
def whole(long_flags, tmp_path_factory):
    """An undisturbed run with a checkpoint after each update."""
    folder = tmp_path_factory.mktemp("whole")
    run(long_flags, folder, "--checkpointing_steps=1")
    return folder


@pytest.mark.parametrize("stop", ["step_3", "step_5", "step_7", "step_12", "step_14"])
def test_resuming_gives_the_same_bits(long_flags, whole, tmp_path, stop):
    """At a logged update, between two, at the end of an epoch, in the next one, and at the end."""
    source = f"--resume_from_checkpoint={whole / stop}"
    run(long_flags, tmp_path, "--checkpointing_steps=14", source)
    assert_same_run(tmp_path, whole, "step_14")


def test_stopped_wherever_it_asks_the_same_command_finishes_the_same(long_flags, whole, tmp_path):
    """After each micro-batch, in each evaluation, again and again, until the run is done."""
    stops = []
    for num_checks in range(2, 100):
        arguments = [*long_flags, f"--output_dir={tmp_path}", "--checkpointing_steps=14"]
        try:
            main(parse_arguments(arguments), StopAfter(num_checks))
            break
        except Preempted as stopped:
            stops.append(str(stopped))
            assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"
    assert len(stops) > 5
    assert all("stopped by SIGTERM" in line and "run the same command again" in line
               for line in stops)  # fmt: skip
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
    assert_same_run(tmp_path, whole, "step_14")


def test_a_stop_in_the_evaluation_does_not_wait_for_its_end(flags, tmp_path):
    """It asks twice at the start, after each of 7 updates, and before each of 3 batches."""
    run_until(flags, tmp_path, 10, "--per_device_eval_batch_size=8")
    state = json.loads((tmp_path / "epoch_0" / "training_state.json").read_text())
    assert (state["update"], state["evaluated"]) == (7, 0)


def test_before_the_first_update_there_is_nothing_to_save(long_flags, tmp_path):
    assert "before the first update" in run_until(long_flags, tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_left_as_it_is(flags, tmp_path, capsys):
    results = run(flags, tmp_path)
    before = read_weights(tmp_path), read_metrics(tmp_path)
    assert run(flags, tmp_path) == results, "its speed too, which is that of the first start"
    assert "resuming from" in capsys.readouterr().out
    assert difference(before[0], read_weights(tmp_path)) == 0
    assert before[1] == read_metrics(tmp_path)


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew(flags, tmp_path):
    run(flags, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    shutil.rmtree(tmp_path / "epoch_0")
    with pytest.raises(InputError, match="holds a finished run without its checkpoints"):
        run(flags, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_resuming_with_another_accumulation_keeps_the_batches(flags, tmp_path):
    """A checkpoint in the middle of Accelerate's count of micro-batches."""
    run(flags, tmp_path / "whole")
    three = "--gradient_accumulation_steps=3"
    run_until(flags, tmp_path / "out", 14, three)
    assert (tmp_path / "out" / "step_4").is_dir()
    run(flags, tmp_path / "out", "--gradient_accumulation_steps=2")
    rest, once = (read_weights(tmp_path / name / "epoch_0") for name in ("out", "whole"))
    assert difference(rest, once) < 1e-6


def test_a_half_written_line_is_dropped(flags, tmp_path):
    run_until(flags, tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 7, "lo')
    run(flags, tmp_path)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_more_epochs_go_on_from_the_last(flags, tmp_path, capsys):
    run(flags, tmp_path)
    results = run(flags, tmp_path, "--num_train_epochs=2")
    assert "epoch_0, after update 7" in capsys.readouterr().out
    assert results["num_updates"] == 14
    updates = [line["update"] for line in read_metrics(tmp_path) if "loss" in line]
    assert updates == list(range(1, 15))
    with pytest.raises(InputError, match="num_train_epochs 2 there, 1 here"):
        run(flags, tmp_path)


def test_a_checkpoint_of_another_run_is_refused_field_by_field(flags, tmp_path):
    run(flags, tmp_path / "one", "--max_train_steps=2")
    source = f"--resume_from_checkpoint={tmp_path / 'one' / 'epoch_0'}"
    with pytest.raises(InputError) as refused:
        run(flags, tmp_path / "two", "--max_train_steps=2", "--seed=1", "--weight_decay=0", source)
    for words in ("seed 42 there, 1 here", "weight_decay 0.01 there, 0.0 here", "epoch_0"):
        assert words in str(refused.value)
    assert not (tmp_path / "two").exists()


def test_a_run_that_is_to_become_longer_says_what_that_means(flags, tmp_path, capsys):
    run(flags, tmp_path)
    run(flags, tmp_path, "--num_train_epochs=2")
    assert "num_train_epochs was 1 and is 2 now: from here on the learning rate follows the" in (
        capsys.readouterr().out
    )
    with pytest.raises(InputError, match="num_train_epochs 2 there, 1 here"):
        run(flags, tmp_path)


def test_stopped_before_the_first_update_of_its_own_it_keeps_what_it_went_on_from(
    long_flags, whole, tmp_path
):
    source = tmp_path / "step_9"
    shutil.copytree(whole / "step_9", source)
    run_until(long_flags, tmp_path / "out", 1, f"--resume_from_checkpoint={source}")
    shutil.rmtree(source)
    run(long_flags, tmp_path / "out", "--checkpointing_steps=14")
    assert_same_run(tmp_path / "out", whole, "step_14")


def test_test_rows_may_come_later(flags, files, tmp_path):
    run_until(flags, tmp_path, 3)
    assert run(flags, tmp_path, f"--test_file={files['test']}")["test_num_rows"] == 9


def test_other_rows_are_another_run(flags, files, tmp_path):
    """Files may move, but what is in them may not change."""
    data = tmp_path / "data.csv"
    shutil.copy(files["train"], data)
    run_until(flags, tmp_path / "out", 3, f"--train_file={data}")
    moved = shutil.copy(data, tmp_path / "moved.csv")
    run_until(flags, tmp_path / "out", 3, f"--train_file={moved}")
    data.write_text(files["train"].read_text().replace("the", "a"))
    with pytest.raises(InputError, match="data_fingerprint '.*' there, '.*' here"):
        run(flags, tmp_path / "out", f"--train_file={data}")


def test_overwriting_starts_anew(flags, tmp_path, capsys):
    run(flags, tmp_path, "--checkpointing_steps=3", "--max_train_steps=7")
    (tmp_path / "step_5").mkdir()
    capsys.readouterr()
    run(flags, tmp_path, "--max_train_steps=1", "--seed=1", "--overwrite_output_dir")
    assert "resuming" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*_[0-9]")) == ["epoch_0", "step_5"]


def test_a_restart_of_an_overwriting_command_goes_on(flags, tmp_path, monkeypatch, capsys):
    """Slurm runs the batch script of a requeued job again, with the same flags."""
    run_until(flags, tmp_path, 4, "--overwrite_output_dir")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(flags, tmp_path, "--overwrite_output_dir")
    assert "resuming from" in capsys.readouterr().out


def test_a_restart_whose_first_start_did_not_come_so_far_overwrites(
    flags, tmp_path, monkeypatch, capsys
):
    """What is in the folder then is not of this job."""
    run(flags, tmp_path, "--seed=1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    capsys.readouterr()
    run(flags, tmp_path, "--overwrite_output_dir")
    assert "resuming from" not in capsys.readouterr().out


def test_a_restart_of_a_command_that_names_a_checkpoint_resumes_from_its_own(
    flags, tmp_path, monkeypatch, capsys
):
    run_until(flags, tmp_path / "one", 3)
    (first,) = (tmp_path / "one").glob("step_*")
    named = f"--resume_from_checkpoint={first}"
    run_until(flags, tmp_path / "two", 4, named)
    (second,) = (tmp_path / "two").glob("step_*")
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(flags, tmp_path / "two", named)
    assert f"resuming from {second}" in capsys.readouterr().out


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
@pytest.mark.parametrize(
    "file",
    CONTENTS,
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    flags, whole, long_flags, tmp_path, capsys, file, how
):
    copy_run(whole, tmp_path, "step_9", "step_12")
    damage(tmp_path / "step_12" / file, how)
    run(long_flags, tmp_path, "--checkpointing_steps=14")
    printed = capsys.readouterr()
    assert "resuming from" in printed.out
    assert "step_9, after update 9" in printed.out
    skipped = [line for line in printed.err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 1
    assert "step_12" in skipped[0]
    assert file in skipped[0]
    assert_same_run(tmp_path, whole, "step_14")


def test_what_is_written_is_kept_beside_a_damaged_checkpoint_of_a_later_update(
    long_flags, whole, tmp_path
):
    copy_run(whole, tmp_path, "step_9", "step_12")
    damage(tmp_path / "step_12" / "model.safetensors", "flipped")
    more = ["--checkpointing_steps=14", "--checkpoints_to_keep=1"]
    run_until(long_flags, tmp_path, 5, *more)
    assert 9 < manifests.newest(tmp_path)[0][1]["update"] < 12
    run(long_flags, tmp_path, *more)
    assert_same_run(tmp_path, whole, "step_14")


def test_killed_between_two_renames_the_old_checkpoint_is_found(
    long_flags, whole, tmp_path, capsys
):
    """One that is written once more is moved aside before the new one gets its name."""
    copy_run(whole, tmp_path, "step_9")
    (tmp_path / "step_9").rename(tmp_path / f".step_9{REPLACED}")
    shutil.copytree(whole / "step_9", beside(tmp_path / "step_9"))
    run(long_flags, tmp_path, "--checkpointing_steps=14")
    assert f"resuming from {tmp_path / 'step_9'}" in capsys.readouterr().out
    assert not list(tmp_path.glob(".step*"))
    assert_same_run(tmp_path, whole, "step_14")


def test_weights_that_never_get_a_gradient(flags, tmp_path):
    """LUKE has some for entities, which are not among the inputs here."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "entity_vocab_size": 10,
        "entity_emb_size": 16,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LukeForSequenceClassification(LukeConfig(**sizes))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "luke")
    more = [f"--model_name_or_path={tmp_path / 'luke'}"]
    run(flags, tmp_path / "whole", *more)
    run_until(flags, tmp_path / "out", 5, *more)
    run(flags, tmp_path / "out", *more)
    assert_same_run(tmp_path / "out", tmp_path / "whole", "epoch_0")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(long_flags, whole, tmp_path):
    shutil.copytree(whole / "step_9", tmp_path / "step_9")
    damage(tmp_path / "step_9" / "model.safetensors", "flipped")
    with pytest.raises(InputError, match="step_9 is damaged: model.safetensors was altered"):
        run(long_flags, tmp_path / "out", f"--resume_from_checkpoint={tmp_path / 'step_9'}")
    assert not (tmp_path / "out").exists()


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("matching", [True, False], ids=["manifest matches", "manifest as it was"])
@pytest.mark.parametrize(
    "file",
    [*CONTENTS, "random_states_0.pkl"],
)
def test_loading_executes_nothing(long_flags, whole, tmp_path, file, matching):
    source = tmp_path / "step_9"
    shutil.copytree(whole / "step_9", source)
    (source / file).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    if matching and file != "manifest.json":
        manifest = json.loads((source / "manifest.json").read_text())
        del manifest["checksum"]
        (source / "manifest.json").unlink()
        manifest["files"] = manifests.file_entries(source)
        manifest["checksum"] = manifests.digest(manifest)
        (source / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--checkpointing_steps=14", f"--resume_from_checkpoint={source}"]
    with contextlib.suppress(InputError):
        run(long_flags, tmp_path / "out", *arguments)
    assert not (tmp_path / "executed").exists()


def test_keeps_the_newest_and_the_best(flags, tmp_path):
    """With a learning rate of 0 the first evaluation stays the best."""
    more = ["--learning_rate=0", "--eval_every=2", "--checkpointing_steps=1"]
    run(flags, tmp_path, *more, "--checkpoints_to_keep=2")
    kept = sorted(path.name for path in tmp_path.glob("step_*"))
    assert kept == ["step_2", "step_6", "step_7"]


def test_folders_of_others_are_left_alone(flags, tmp_path):
    run_until(flags, tmp_path, 4)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "mine.txt").write_text("mine")
    run(flags, tmp_path)
    assert (tmp_path / "step_1" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "step_notes").is_dir()
    kept = {path.name for path in tmp_path.glob("*_[0-9]*")}
    assert kept == {"step_1", "epoch_0"}, "without --checkpointing_steps only the newest is kept"


def test_no_name_but_those_of_this_script_is_cleaned_up(flags, tmp_path):
    run_until(flags, tmp_path, 4)
    for name in (".backup.old", ".notes.writing"):
        (tmp_path / name).mkdir()
    run(flags, tmp_path)
    assert (tmp_path / ".backup.old").is_dir()
    assert (tmp_path / ".notes.writing").is_dir()


def test_two_runs_do_not_write_to_one_folder(long_flags, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [*long_flags, "--num_train_epochs=60", f"--output_dir={out}"]
    process = start_script(arguments, log=log)
    wait_for(lambda: last_update(out) > 3)
    done = run_script(arguments)
    assert done.returncode == 2
    assert f"is in use by another run (process {process.pid} on" in done.stderr
    assert process.wait(200) == 0
    updates = [line["update"] for line in read_metrics(out) if "loss" in line]
    assert len(updates) == len(set(updates)) == 140


def test_a_folder_in_the_way_is_not_replaced(flags, tmp_path):
    run_until(flags, tmp_path, 3)
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "epoch_0" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="epoch_0 is in the way"):
        run(flags, tmp_path)
    assert (tmp_path / "epoch_0" / "mine.txt").read_text() == "mine"


def test_the_best_score_and_the_patience_survive(flags, tmp_path):
    """The first evaluation stays the best: with a patience of 3, the fourth is the last."""
    more = ["--learning_rate=0", "--eval_every=1", "--early_stopping_patience=3"]
    for num_checks in (5, 5, 5, 5, 100):
        arguments = [*flags, f"--output_dir={tmp_path}", *more, "--logging_steps=100"]
        try:
            results = main(parse_arguments(arguments), StopAfter(num_checks))
        except Preempted:
            continue
    assert results["num_updates"] == 4
    assert results["best_update"] == 1


@pytest.mark.parametrize(
    ("update", "steps", "expected"),
    [
        (7, None, "epoch_0"),
        (6, None, None),
        (14, "epoch", "epoch_1"),
        (17, "epoch", "epoch_2"),  # the end, in the third epoch
        (6, "3", "step_6"),
        (7, "3", None),
    ],
)
def test_names(update, steps, expected):
    assert Timetable(17, 7, None, steps).checkpoint_due(update) == expected


def test_of_equal_scores_the_first_is_the_best():
    state = TrainingState(update=1)
    assert state.record(0.5, lower_is_better=False)
    state.update = 2
    assert not state.record(0.5, lower_is_better=False)
    assert (state.best_update, state.num_worse, state.evaluated) == (1, 1, 2)


def limited(arguments, size):
    """Run the script where no file may become larger than `size` bytes."""
    words = " ".join(f"'{word}'" for word in [sys.executable, str(SCRIPT), *arguments])
    return subprocess.run(
        ["bash", "-c", f"ulimit -f {size // 1024}; exec {words}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_good(flags, tmp_path):
    run_until(flags, tmp_path, 4)
    arguments = [*flags, f"--output_dir={tmp_path}"]
    done = limited(arguments, 64 * 1024)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(error) == 1
    assert str(tmp_path) in error[0]
    assert "ulimit -f" in error[0]
    assert manifests.newest(tmp_path)[0][0].name == "step_3"
    done = run_script(arguments)
    assert done.returncode == 0, done.stderr
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
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(flags, small_disk):
    out = small_disk / "out"
    filler = small_disk / "filler"
    run_until(flags, out, 4)
    filler.write_bytes(b"x" * (space(small_disk) - 200_000))
    arguments = [*flags, f"--output_dir={out}"]
    done = run_script(arguments)
    assert done.returncode == 2
    assert "No space left on device; free some space" in done.stderr
    assert manifests.newest(out)[0][0].name == "step_3"
    filler.unlink()
    done = run_script(arguments)
    assert done.returncode == 0, done.stderr


def space(folder):
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def test_a_folder_that_became_read_only(flags, small_disk):
    out = small_disk / "out"
    run_until(flags, out, 4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run_script([*flags, f"--output_dir={out}"])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert done.returncode == 2
    assert str(out) in done.stderr
    assert done.stderr.count("error") == 1
    assert run_script([*flags, f"--output_dir={out}"]).returncode == 0


def test_a_checkpoint_that_may_not_be_read(flags, tmp_path):
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


def test_a_checkpoint_holds_no_more_than_what_was_computed(whole):
    names = sorted(path.name for path in Path(whole / "step_9").iterdir())
    assert names == sorted(CONTENTS)
    manifest = json.loads((whole / "step_9" / "manifest.json").read_text())
    assert manifest["update"] == 9
    assert manifest["epoch"] == pytest.approx(9 / 7)
    assert manifest["num_processes"] == 1
    assert manifest["run"]["seed"] == 42
    assert set(manifest["files"]) == {*names} - {"manifest.json"}
