"""Training on one task, then on another from its folder, with another number of labels."""

import json

import pytest
import torch
from conftest import pairs, read_weights, write_csv
from runs import error_line, run, run_and_exit
from transformers import pipeline

LABELS = ("contradiction", "entailment", "neutral")


@pytest.fixture(scope="module")
def first_stage(flags, tmp_path_factory):
    """A run on three classes, as MNLI has them."""
    folder = tmp_path_factory.mktemp("stages")
    rows = [{**row, "label": LABELS[number % 3]} for number, row in enumerate(pairs(24, 41))]
    path = write_csv(folder / "nli.csv", rows)
    data = [f"--train_file={path}", f"--validation_file={path}"]
    results = run([*flags, *data], folder / "nli")
    assert results["eval_macro_f1"] == pytest.approx(
        2 * results["eval_combined_score"] - results["eval_accuracy"]
    )
    return folder / "nli"


def test_the_second_stage_keeps_the_encoder_and_has_a_new_classifier(flags, first_stage, tmp_path):
    """With a learning rate of 0 the second run exports what it started from."""
    second = [f"--model_name_or_path={first_stage}", "--ignore_mismatched_sizes"]
    run([*flags, *second], tmp_path, "--learning_rate=0", "--max_train_steps=1")
    before, after = read_weights(first_stage), read_weights(tmp_path)
    assert before.keys() == after.keys()
    new = {name for name in before if not torch.equal(before[name], after[name])}
    assert new == {"classifier.weight", "classifier.bias"}
    assert (before["classifier.weight"].shape, after["classifier.weight"].shape) == (
        (3, 32),
        (2, 32),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}
    assert config["label2id"] == {"0": 0, "1": 1}
    (answer,) = pipeline("text-classification", str(tmp_path))([{"text": "a", "text_pair": "b"}])
    assert answer["label"] in ("0", "1")


def test_the_second_stage_trains_and_resumes(flags, first_stage, tmp_path):
    """Its checkpoints need nothing of the first run but the folder."""
    second = [*flags, f"--model_name_or_path={first_stage}", "--ignore_mismatched_sizes"]
    run(second, tmp_path / "whole", "--checkpointing_steps=3", "--max_train_steps=6")
    start = f"--resume_from_checkpoint={tmp_path / 'whole' / 'step_3'}"
    run(second, tmp_path / "resumed", start, "--max_train_steps=6")
    whole, resumed = (read_weights(tmp_path / name) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first = read_weights(first_stage)
    assert not torch.equal(first["bert.pooler.dense.weight"], whole["bert.pooler.dense.weight"])


def test_a_classifier_of_another_task_is_not_replaced_unasked(flags, first_stage, tmp_path, capsys):
    second = f"--model_name_or_path={first_stage}"
    assert run_and_exit([*flags, second], tmp_path / "out") == 2
    assert "classifies into 3 labels, the data have 2: --ignore_mismatched_sizes" in error_line(
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_classifier_follows_the_names_of_its_labels(flags, tmp_path):
    """Files number their labels in alphabetical order, GLUE's tasks do not."""
    rows = [{**row, "label": ("no", "yes")[row["label"]]} for row in pairs(12, 41)]
    path = write_csv(tmp_path / "pairs.csv", rows)
    data = [*flags, f"--train_file={path}", f"--validation_file={path}", "--max_train_steps=1"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(data, first)
    config = json.loads((first / "config.json").read_text())
    config["id2label"] = {"0": "yes", "1": "no"}  # as a task of GLUE may number them
    (first / "config.json").write_text(json.dumps(config))
    run(data, second, f"--model_name_or_path={first}", "--learning_rate=0")
    before, after = read_weights(first), read_weights(second)
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(after[name], before[name].flip(0))
    assert torch.equal(after["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])
