"""The model card describes the run, and its snippet runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import pairs, write_csv
from finished_run import write_finished_run
from huggingface_hub import ModelCard, parse_eval_result_entries

from lib.cli.parsing import parse_arguments
from lib.data.tasks import TASKS, task_of_files
from lib.training import metrics
from train_mrpc import main

LINES = [
    {"index": row, "prediction": "b", "label": label, "probabilities": {"a": 0.4, "b": 0.6}}
    for row, label in enumerate("ab")
]
PAIRS = task_of_files(("one", "other"), ("a", "b"))


@pytest.fixture(scope="module")
def finished(flags, files, tmp_path_factory):
    """The output folder of a real run, with two blanks in its path, and its results."""
    folder = tmp_path_factory.mktemp("my models") / "a model"
    arguments = [*flags, f"--test_file={files['test']}", f"--output_dir={folder}"]
    return folder, main(parse_arguments(arguments))


def snippet(folder):
    return re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def use(folder, code):
    """Run what a reader copies from the card, in a process of its own where the card lies."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_snippet_runs_and_takes_texts_longer_than_the_model(finished):
    folder, _ = finished
    longer = "classify({'text': 'so ' * 2000, 'text_pair': 'on Monday ' * 2000})"
    done = use(folder, f"{snippet(folder)}\nprint({longer})")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"'label': '[01]', 'score': 0\.\d+", done.stdout)) == 2


def test_the_snippet_of_single_sentences_gives_one_text(flags, tmp_path):
    rows = [{"text": row["sentence1"], "label": row["label"] * 2.5 + 0.1} for row in pairs(20, 4)]
    path = write_csv(tmp_path / "texts.csv", rows)
    arguments = [
        f"--train_file={path}",
        f"--validation_file={path}",
        f"--output_dir={tmp_path}/out",
    ]
    main(parse_arguments([*flags, *arguments, "--max_train_steps=1"]))
    assert "text_pair" not in snippet(tmp_path / "out")
    done = use(tmp_path / "out", snippet(tmp_path / "out"))
    assert done.returncode == 0, done.stderr


def test_scores_name_the_file_they_were_measured_on(finished):
    folder, results = finished
    card = ModelCard.load(folder / "README.md")
    found = {
        (result.dataset_split, result.dataset_name, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    for metric in ("accuracy", "f1", "combined_score", *metrics.OF_CLASSIFIERS):
        assert found.pop(("validation", "validation.csv", metric)) == results[f"eval_{metric}"]
        assert found.pop(("test", "test.csv", metric)) == results[f"test_{metric}"]
    assert found == {}
    assert card.data.pipeline_tag == "text-classification"
    assert "fine-tuned on `train.csv`, 53 rows" in card.text
    assert "Validation, 23 rows of `validation.csv`" in card.text
    assert "Test, 9 rows of `test.csv`" in card.text


def test_the_card_names_no_directory_of_the_machine(finished, files, bert):
    folder, _ = finished
    card = (folder / "README.md").read_text()
    for path in (folder.parent, files["train"].parent, bert.parent, Path.home()):
        assert f"{path}" not in card
    assert f"`{bert.name}` fine-tuned" in card


def test_names_on_the_hub_are_kept_and_those_of_folders_are_cut(tmp_path, monkeypatch):
    for name in ("far/model", "far/data"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    task, out = TASKS["mrpc"], tmp_path / "out"
    lines = [
        {"index": 0, "prediction": name, "label": name}
        | {"probabilities": {other: float(name == other) for other in task.labels}}
        for name in task.labels
    ]
    hub = {"model_name_or_path": "org/model", "dataset_name": "nyu-mll/glue", "task_name": "mrpc"}
    card = ModelCard.load(write_finished_run(out, task, lines, **hub) / "README.md")
    assert card.data.base_model == "org/model"
    assert {result.dataset_type for result in card.data.eval_results} == {"nyu-mll/glue"}
    assert {result.dataset_config for result in card.data.eval_results} == {"mrpc"}
    local = {"model_name_or_path": "far/model", "dataset_name": "far/data", "task_name": "mrpc"}
    card = ModelCard.load(write_finished_run(out, task, lines, **local) / "README.md")
    assert card.data.base_model is None
    assert {result.dataset_type for result in card.data.eval_results} == {"custom"}
    assert "`model` fine-tuned on `data` (mrpc)" in card.text
    assert "far" not in card.content


def test_only_the_settings_that_applied_are_listed(tmp_path):
    steps = {
        "num_train_epochs": 3,
        "max_train_steps": 2,
        "warmup_ratio": 0.1,
        "learning_rate": 1e-4,
    }
    card = (write_finished_run(tmp_path, PAIRS, LINES, **steps) / "README.md").read_text()
    for line in ("| max_train_steps | 2 |", "| warmup_ratio | 0.1 |", "| learning_rate | 0.0001 |"):
        assert line in card
    assert "num_train_epochs" not in card
    assert "None" not in card


COST = (
    "61 s, 20.0 examples/s, 0.0123 TFLOP/s, 1.50 GiB of resident memory at the peak, "
    "10.0% of the tokens padding"
)


def test_card_and_page_say_what_the_training_took(tmp_path):
    folder = write_finished_run(tmp_path, PAIRS, LINES)
    for name in ("README.md", "report/index.html"):
        assert COST in (folder / name).read_text()


def test_the_card_shows_the_plots(finished):
    folder, _ = finished
    shown = re.findall(r"!\[.+\]\((.+)\)", (folder / "README.md").read_text())
    assert "report/learning_curve.png" in shown
    assert {folder / path for path in shown} == set((folder / "report").glob("*.png"))
    for path in shown:
        assert (folder / path).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_card_states_where_model_and_data_come_from(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# A model\n"
    )
    task, commit = TASKS["mrpc"], "0123456789" * 4
    lines = [
        {"index": row, "prediction": name, "label": name}
        | {"probabilities": {other: float(name == other) for other in task.labels}}
        for row, name in enumerate(task.labels)
    ]
    hub = {"dataset_name": "nyu-mll/glue", "task_name": "mrpc", "dataset_revision": commit}
    out = write_finished_run(
        tmp_path / "out", task, lines, test_rows=2, model_name_or_path=str(base), **hub
    )
    card = ModelCard.load(out / "README.md")
    found = card.data.to_dict()
    assert (found["license"], found["language"]) == ("apache-2.0", ["en", "de"])
    assert found["datasets"] == ["nyu-mll/glue"]
    assert found["metrics"] == ["accuracy", "f1"]
    assert found["pipeline_tag"] == "text-classification"
    assert {result.metric_type for result in card.data.eval_results} == {
        "accuracy", "f1", "combined_score",
    }  # fmt: skip
    assert {result.dataset_revision for result in card.data.eval_results} == {commit}
    assert f"`nyu-mll/glue` at commit `{commit}`" in card.text
    (file,) = (out / ".eval_results").glob("*.yaml")
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {(entry.dataset_id, entry.task_id, entry.dataset_revision) for entry in entries} == {
        ("nyu-mll/glue", "mrpc", commit)
    }
    values = {entry.notes: entry.value for entry in entries}
    assert values["accuracy, validation split"] == 0.75
    assert values["f1 of 'equivalent', test split"] == 0.5
    # The same folder, with data of one's own and a model whose license nobody knows.
    write_finished_run(out, task, lines, model_name_or_path="org/model", dataset_name=str(base))
    found = ModelCard.load(out / "README.md").data.to_dict()
    assert found.keys().isdisjoint({"license", "language", "datasets"})
    assert not file.exists()
