"""The same run on one, two and three real processes (gloo)."""

import json

import pytest
import sklearn.metrics
from conftest import pairs, read_metrics, run_script, write_csv
from runs import assert_same_course, run

pytestmark = pytest.mark.processes

VALIDATION_ROWS = 408


@pytest.fixture(scope="module")
def runs(flags, once, run_on, tmp_path_factory):
    """Folders of runs by name: training by (processes, accumulation), evaluation by batch.

    Resumed ones are named after the processes before and after.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "1x1").symlink_to(once)
    many = write_csv(folder / "many.csv", pairs(VALIDATION_ROWS, 21))

    def training(name, *more):
        return [*flags, f"--output_dir={folder / name}", "--checkpointing_steps=epoch", *more]

    def evaluation(name, batch):
        data = [f"--validation_file={many}", f"--test_file={many}", "--max_train_steps=2"]
        size = f"--per_device_eval_batch_size={batch}"
        return [*flags, f"--output_dir={folder / name}", *data, size]

    def interrupted(name):
        return training(name, "--checkpointing_steps=3")

    def resumed(name, source):
        return training(name, f"--resume_from_checkpoint={folder / source / 'step_3'}")

    run(evaluation("1-7", 7), folder / "1-7")
    run(evaluation("1-32", 32), folder / "1-32")
    run(interrupted("1"), folder / "1")
    run_on(
        2,
        training("2x1", "--report_to=wandb"),
        training("2x2", "--gradient_accumulation_steps=2"),
        evaluation("2-7", 7),
        evaluation("2-32", 32),
        interrupted("2"),
        resumed("1 to 2", "1"),
    )
    run_on(
        3,
        training("3x1", "--report_to=wandb"),
        evaluation("3-7", 7),
        evaluation("3-32", 32),
        interrupted("3"),
        resumed("1 to 3", "1"),
        resumed("2 to 3", "2"),
    )
    for source in ("2", "3"):
        name = f"{source} to 1"
        run(resumed(name, source), folder / name)
    return folder


@pytest.mark.parametrize("name", ["2x1", "2x2", "3x1"])
def test_training_takes_the_same_course(runs, name):
    """Learning rate, loss, gradient norm and weights; 3 processes share 8 or 7 rows unevenly."""
    assert_same_course(runs / name, runs / "1x1")


@pytest.mark.parametrize("name", ["1x1", "2x1", "2x2", "3x1"])
def test_learning_rate_by_hand(runs, name):
    """One update of warm-up, then down to 0 after the seventh."""
    rates = [line["learning_rate"] for line in read_metrics(runs / name) if "loss" in line]
    assert rates == pytest.approx([0, *(1e-3 * left / 6 for left in (6, 5, 4, 3, 2, 1))])


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["1-7", "1-32", "2-7", "2-32", "3-7", "3-32"])
def test_every_row_is_evaluated_once(runs, name, split):
    rows = predictions(runs / name, split)
    assert [row["index"] for row in rows] == list(range(VALIDATION_ROWS))
    reference = predictions(runs / "1-32", split)
    for row, other in zip(rows, reference, strict=True):
        assert row["label"] == other["label"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.mark.parametrize("name", ["1-7", "1-32", "2-7", "2-32", "3-7", "3-32"])
def test_metrics_are_those_of_scikit_learn_over_all_rows(runs, name):
    rows = predictions(runs / name, "validation")
    truth, answers = ([row[key] for row in rows] for key in ("label", "prediction"))
    results = json.loads((runs / name / "all_results.json").read_text())
    assert results["eval_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, answers))
    assert results["eval_f1"] == pytest.approx(
        sklearn.metrics.f1_score(truth, answers, pos_label="1", zero_division=0)
    )
    matrix = sklearn.metrics.confusion_matrix(truth, answers)
    first = predictions(runs / "1-32", "validation")
    expected = sklearn.metrics.confusion_matrix(
        [row["label"] for row in first], [row["prediction"] for row in first]
    )
    assert (matrix == expected).all()


def predictions(folder, split):
    lines = (folder / "predictions" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["1 to 2", "1 to 3", "2 to 1", "2 to 3", "3 to 1"])
def test_resumes_on_another_number_of_processes(runs, name):
    """The same batches and learning rates, update by update, and the same weights."""
    assert_same_course(runs / name, runs / "1x1")


@pytest.mark.parametrize("name", ["2x1", "3x1"])
def test_several_processes_are_one_wandb_run(runs, name):
    assert len(list((runs / name / "wandb").glob("offline-run-*"))) == 1


def test_an_error_ends_all_processes_and_is_printed_once(flags, tmp_path):
    done = run_script([*flags, "--max_length=4096", f"--output_dir={tmp_path}"], num_processes=2)
    assert done.returncode != 0
    assert done.stderr.count("train_mrpc.py: error: --max_length 4096 is more than") == 1


def test_rejects_processes_that_do_not_see_each_other(flags, tmp_path, monkeypatch):
    """As under a multi-GPU launch without a GPU, where Accelerate starts two whole trainings."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run_script([*flags, f"--output_dir={tmp_path / 'out'}"])
    assert done.returncode == 2
    assert "started 2 processes (WORLD_SIZE), but they do not see each other" in done.stderr
    assert not (tmp_path / "out").exists()
