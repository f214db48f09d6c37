"""Weights of the classes: the gradient of an update is torch's, however its rows are split."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import pairs, read_metrics, read_weights, write_csv
from datasets import Dataset
from models import load, tokenizer_of
from runs import assert_same_course, difference, run
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from lib.cli.config import TrainConfig
from lib.data.batching import plan_epoch
from lib.data.splits import Splits
from lib.data.tasks import IGNORED, Task
from lib.errors import InputError
from lib.training.optimization import Criterion, class_weights, loss_sum

LABELS = [2, 0, 0, 1, 0, 0, 2, 0, 1, 0, 0]


def splits_of(labels, names=("a", "b", "c")):
    rows = Dataset.from_dict({"sentence": ["x"] * len(labels), "labels": labels})
    return Splits(Task(("sentence",), names, ("accuracy",)), rows, {}, {}, "made up")


def test_balanced_weights_are_those_of_scikit_learn():
    found = class_weights(["balanced"], splits_of(LABELS))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert found.tolist() == expected.tolist()
    assert found.tolist() == [11 / (3 * 7), 11 / (3 * 2), 11 / (3 * 2)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_divided_by_the_weight_is_the_mean_of_torch(smoothing):
    criterion = Criterion(splits_of(LABELS), ["0.5", "2", "7"], smoothing)
    logits, labels = torch.randn(12, 3), torch.tensor([*LABELS, IGNORED])
    total = criterion.total_weight([np.arange(0, 11, 2), np.arange(1, 11, 2)])
    assert total == 7 * 0.5 + 2 * 2 + 2 * 7
    expected = cross_entropy(
        logits, labels, torch.tensor([0.5, 2.0, 7.0]), label_smoothing=smoothing
    )
    assert (criterion.sum(logits, labels) / total).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_without_weights_the_total_is_the_number_of_rows():
    criterion = Criterion(splits_of(LABELS), ["none"], 0.0)
    assert criterion.total_weight([np.array([3, 4]), np.array([7])]) == 3
    logits, labels = torch.randn(11, 3), torch.tensor(LABELS)
    assert torch.equal(criterion.sum(logits, labels), loss_sum(logits, labels))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 4])
def test_the_gradient_is_that_of_the_whole_global_batch(bert, num_micro_batches):
    """8 rows at once, as 2 x 4, 4 x 2, and 3, 3 and 2, against torch's own weighted mean."""
    rows = pairs(8, 5)
    labels = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0])
    tokenizer, model = tokenizer_of(bert), load(bert)
    criterion = Criterion(splits_of(labels.tolist(), ("no", "yes")), ["balanced"], 0.1)
    lengths = np.full(8, 9)
    (batch,) = plan_epoch(lengths, 0, seed=1, batch_size=8, num_micro_batches=num_micro_batches)

    def logits_of(numbers):
        texts = [[rows[row][name] for row in numbers] for name in ("sentence1", "sentence2")]
        return model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits

    whole = logits_of(range(8))
    weights = torch.tensor([8 / (2 * 6), 8 / (2 * 2)])
    cross_entropy(whole, labels, weights, label_smoothing=0.1).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for numbers in batch:
        loss = criterion.sum(logits_of(numbers), labels[numbers])
        (loss / criterion.total_weight(batch)).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def unbalanced(flags, tmp_path_factory):
    """Flags of a run on rows of which one in four is a paraphrase."""
    rows = pairs(200, 31)
    rows = [row for row in rows if row["label"] == 0][:39] + [r for r in rows if r["label"]][:14]
    path = write_csv(tmp_path_factory.mktemp("unbalanced") / "train.csv", rows)
    return [*flags, f"--train_file={path}", "--class_weights", "balanced"], path


@pytest.fixture(scope="module")
def weighted(unbalanced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    run(unbalanced[0], folder, "--checkpointing_steps=epoch")
    return folder


@pytest.mark.parametrize("accumulation", [2, 3])
def test_training_takes_the_same_course_however_rows_are_split(
    unbalanced, weighted, accumulation, tmp_path
):
    more = ("--checkpointing_steps=epoch", f"--gradient_accumulation_steps={accumulation}")
    run(unbalanced[0], tmp_path / "out", *more)
    assert_same_course(tmp_path / "out", weighted)


@pytest.mark.processes
def test_training_takes_the_same_course_on_two_processes(unbalanced, weighted, run_on, tmp_path):
    common = [*unbalanced[0], "--checkpointing_steps=epoch"]
    run_on(
        2,
        [*common, f"--output_dir={tmp_path / '2x1'}"],
        [*common, f"--output_dir={tmp_path / '2x2'}", "--gradient_accumulation_steps=2"],
    )
    assert_same_course(tmp_path / "2x1", weighted)
    assert_same_course(tmp_path / "2x2", weighted)


def test_the_logged_loss_is_the_weighted_mean(unbalanced, weighted, bert):
    """By torch, from the rows of the first update, at whose end nothing is learned yet."""
    rows = list(csv.DictReader(unbalanced[1].read_text().splitlines()))
    tokenizer, model = tokenizer_of(bert), load(bert, seed=42)
    tokens = tokenizer(*([row[name] for row in rows] for name in ("sentence1", "sentence2")))
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    ((batch,), *_) = plan_epoch(lengths, 0, seed=42, batch_size=8, num_micro_batches=1)
    labels = torch.tensor([int(rows[row]["label"]) for row in batch])
    texts = [[rows[row][name] for row in batch] for name in ("sentence1", "sentence2")]
    with torch.no_grad():
        logits = model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits
    weights = [53 / (2 * 39), 53 / (2 * 14)]
    expected = cross_entropy(logits, labels, torch.tensor(weights)).item()
    assert read_metrics(weighted)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    manifest = json.loads((weighted / "manifest.json").read_text())
    assert manifest["label_weights"] == pytest.approx({"0": weights[0], "1": weights[1]})


def test_equal_weights_train_as_none(flags, once, tmp_path):
    """However large: the loss is divided by their sum."""
    run(flags, tmp_path, "--checkpointing_steps=epoch", "--class_weights", "3", "3")
    assert_same_course(tmp_path, once)


def test_weights_change_what_is_learned(unbalanced, weighted, tmp_path):
    run(unbalanced[0], tmp_path, "--class_weights", "none")
    assert difference(read_weights(tmp_path), read_weights(weighted)) > 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("balanced", "1"), "must be balanced, none, or a positive number for each class, got bal"),
        (("0", "1"), "must be balanced, none, or a positive number for each class, got 0 1"),
        (("inf", "1"), "a positive number for each class, got inf 1"),
        (("much", "1"), "a positive number for each class, got much 1"),
        ((), "got nothing"),
    ],
)
def test_rejects_weights_that_are_none(given, message):
    with pytest.raises(InputError, match=f"--class_weights .*{message}"):
        TrainConfig(demo=True, class_weights=given)


def test_yaml_gives_weights_as_numbers():
    assert TrainConfig(demo=True, class_weights=[1, 2.5]).class_weights == ("1", "2.5")
    with pytest.raises(InputError, match="--class_weights takes a list of text, got True in it"):
        TrainConfig(demo=True, class_weights=[True, 2])


def test_rejects_weights_that_do_not_fit_the_labels():
    with pytest.raises(InputError, match="1 2: 2 weights for 3 classes: give one for each of a, b"):
        class_weights(["1", "2"], splits_of(LABELS))
    with pytest.raises(InputError, match="balanced: no training row is labeled 'b': give numbers"):
        class_weights(["balanced"], splits_of([0, 2]))
    with pytest.raises(InputError, match="balanced: the labels are scores .a regression., not cla"):
        class_weights(["balanced"], splits_of([0.5, 2.0], names=()))
