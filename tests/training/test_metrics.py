import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from conftest import ROOT, read_metrics
from runs import error_line, run, run_and_exit

from lib.data.tasks import TASKS, task_of_files
from lib.training.curves import scores_of_classes
from lib.training.metrics import (
    METRICS,
    OF_CLASSIFIERS,
    best_metric_name,
    bootstrap_scores,
    collapsed_class,
    compute,
    confidence_intervals,
    display_name,
    glue_metric,
    has_labels,
    mean_loss,
    other_metrics,
    predictions_of,
    probabilities_of,
    resampled_scores,
    row_losses,
    score_range,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(2, size=408)
PREDICTIONS = np.where(RNG.random(408) < 0.8, LABELS, 1 - LABELS)


def test_scores_by_hand():
    # Of 5 rows 3 are right; class 1: 2 found, 1 false alarm, 1 missed -> F1 = 4 / (4 + 1 + 1).
    scores = compute(["accuracy", "f1"], np.array([1, 1, 0, 1, 0]), np.array([1, 1, 0, 0, 1]))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["combined_score"] == pytest.approx((3 / 5 + 2 / 3) / 2)


def reference_score(name, predictions, references):
    """The score by scikit-learn or SciPy; 0 for a correlation with a constant."""
    if name == "accuracy":
        return sklearn.metrics.accuracy_score(references, predictions)
    if name == "f1":
        return sklearn.metrics.f1_score(
            references, predictions, labels=[1], average="macro", zero_division=0
        )
    if name == "macro_f1":
        return sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)
    if name == "balanced_accuracy":
        return sklearn.metrics.balanced_accuracy_score(references, predictions)
    if name == "roc_auc":
        return reference_area(predictions, references)
    if name == "matthews_correlation":
        return sklearn.metrics.matthews_corrcoef(references, predictions)
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    correlation = {"pearson": scipy.stats.pearsonr, "spearmanr": scipy.stats.spearmanr}[name]
    return correlation(predictions, references).statistic


def reference_area(probabilities, references):
    """The area by scikit-learn; it has none for a class without rows, which we leave out."""
    classes = np.unique(references)
    if len(classes) == 1:
        return 0.5
    if probabilities.shape[1] == 2:
        return sklearn.metrics.roc_auc_score(references, probabilities[:, 1])
    if len(classes) == probabilities.shape[1]:
        return sklearn.metrics.roc_auc_score(references, probabilities, multi_class="ovr")
    return np.mean(
        [sklearn.metrics.roc_auc_score(references == c, probabilities[:, c]) for c in classes]
    )


OF_DECISIONS = ["accuracy", "f1", "macro_f1", "balanced_accuracy", "matthews_correlation"]


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes")
@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("name", OF_DECISIONS)
def test_scores_of_classes_equal_scikit_learn_to_the_last_bit(name, num_classes):
    for size in (1, 2, 30, 408):
        references = RNG.integers(num_classes, size=size)
        right = RNG.random(size) < 0.6
        predictions = np.where(right, references, RNG.integers(num_classes, size=size))
        expected = reference_score(name, predictions, references)
        assert compute([name], predictions, references) == {name: expected}


@pytest.mark.parametrize("kind", ["distinct", "with ties", "far from 0", "float32"])
@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
def test_correlations_equal_scipy(name, kind):
    references = RNG.random(200)
    predictions = references + RNG.random(200)
    if kind == "with ties":
        predictions, references = predictions.round(1), references.round(1)
    if kind == "far from 0":
        predictions, references = predictions + 1e4, references - 1e4
    if kind == "float32":
        # SciPy gets the same numbers in float64: its own float32 has seven digits.
        predictions, references = predictions.astype(np.float32), references.astype(np.float32)
    expected = reference_score(name, predictions.astype(float), references.astype(float))
    assert compute([name], predictions, references)[name] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
def test_a_correlation_with_a_constant_is_0_and_with_nan_is_nan(name):
    truth = RNG.random(50)
    for constant in (0.0, 0.1, 1e6 + 0.1):
        assert compute([name], np.full(50, constant), truth) == {name: 0.0}
        assert compute([name], truth, np.full(50, constant)) == {name: 0.0}
    assert np.isnan(compute([name], np.where(truth > 0.5, truth, np.nan), truth)[name])


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_areas_equal_scikit_learn(num_classes):
    for size in (1, 2, 30, 408):
        references = RNG.integers(num_classes, size=size)
        logits = RNG.normal(size=(size, num_classes)).round(1)  # with ties
        logits[np.arange(size), references] += 1
        probabilities = probabilities_of(logits)
        expected = reference_area(probabilities, references)
        found = compute(["roc_auc"], probabilities, references)["roc_auc"]
        assert found == pytest.approx(expected, abs=1e-12)


def test_scores_of_unbalanced_classes_by_hand():
    """8 rows of class 0 and 2 of class 1, of which one is found and one row of class 0 lost."""
    truth = np.array([0] * 8 + [1] * 2)
    answers = np.array([1] + [0] * 7 + [1, 0])
    assert compute(["balanced_accuracy"], answers, truth)["balanced_accuracy"] == pytest.approx(
        (7 / 8 + 1 / 2) / 2
    )
    assert compute(["macro_f1"], answers, truth)["macro_f1"] == pytest.approx((14 / 16 + 2 / 4) / 2)
    found = scores_of_classes(answers, truth, ("no", "yes", "never"))
    assert found["no"] == pytest.approx(
        {"precision": 7 / 8, "recall": 7 / 8, "f1": 7 / 8, "rows": 8}
    )
    assert found["yes"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2})
    assert found["never"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 0}


def test_scores_of_classes_equal_scikit_learn():
    labels = RNG.integers(4, size=200)
    predictions = np.where(RNG.random(200) < 0.6, labels, RNG.integers(4, size=200))
    expected = sklearn.metrics.precision_recall_fscore_support(labels, predictions)
    found = scores_of_classes(predictions, labels, "abcd")
    for name, *values in zip("abcd", *expected, strict=True):
        assert list(found[name].values()) == pytest.approx(values)


@pytest.mark.parametrize(
    ("name", "of_sklearn"),
    [
        (
            "macro_f1",
            lambda truth, answers: sklearn.metrics.f1_score(truth, answers, average="macro"),
        ),
        ("balanced_accuracy", sklearn.metrics.balanced_accuracy_score),
    ],
)
def test_intervals_of_other_metrics_equal_the_bootstrap_of_scipy(name, of_sklearn):
    expected = scipy.stats.bootstrap(
        (LABELS, PREDICTIONS), of_sklearn, paired=True, vectorized=False, n_resamples=50,
        method="percentile", rng=5,
    )  # fmt: skip
    found = confidence_intervals([name], PREDICTIONS, LABELS, seed=5, num_resamples=50)
    assert found[name] == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)


def test_files_of_three_classes_are_scored_by_accuracy_and_macro_f1():
    assert task_of_files(("text",), ("a", "b", "c")).metrics == ("accuracy", "macro_f1")
    assert other_metrics(task_of_files(("text",), ("a", "b", "c"))) == (
        "balanced_accuracy",
        "roc_auc",
    )
    assert other_metrics(TASKS["stsb"]) == ()


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy", "roc_auc"])
def test_the_best_model_is_chosen_by_another_metric(metric, flags, tmp_path):
    """It stands in each evaluation; `combined_score` stays the mean of the task's own."""
    results = run(flags, tmp_path, "--eval_every=2", f"--metric_for_best_model={metric}")
    lines = [line for line in read_metrics(tmp_path) if "eval_loss" in line]
    scores = {line["update"]: line[f"eval_{metric}"] for line in lines}
    assert results["best_update"] == max(scores, key=scores.get)
    assert results[f"eval_{metric}"] == pytest.approx(max(scores.values()), abs=1e-9)
    for line in lines:
        mean = (line["eval_accuracy"] + line["eval_f1"]) / 2
        assert line["eval_combined_score"] == pytest.approx(mean)
        assert [name for name in OF_CLASSIFIERS if f"eval_{name}" in line] == [metric]
    rows = [json.loads(line) for line in open_predictions(tmp_path)]
    truth = np.array([int(row["label"]) for row in rows])
    answers = np.array([int(row["prediction"]) for row in rows])
    inputs = np.array([list(row["probabilities"].values()) for row in rows])
    for name in OF_CLASSIFIERS:
        expected = reference_score(name, inputs if name == "roc_auc" else answers, truth)
        assert results[f"eval_{name}"] == pytest.approx(expected)
        low, high = results[f"eval_{name}_ci95"]
        assert low <= expected <= high
    assert results["eval_classes"]["1"]["recall"] == pytest.approx(
        sklearn.metrics.recall_score(truth, answers)
    )


def open_predictions(folder):
    return (folder / "predictions" / "validation.jsonl").read_text().splitlines()


def test_names_the_metrics_that_can_choose_the_best_model(flags, tmp_path, capsys):
    assert run_and_exit(flags, tmp_path, "--metric_for_best_model=auc") == 2
    assert error_line(capsys.readouterr().err).endswith(
        "--metric_for_best_model must be one of accuracy, f1, combined_score, macro_f1, "
        "balanced_accuracy, roc_auc, loss, got 'auc'"
    )


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes")
@pytest.mark.parametrize("name", METRICS)
def test_scores_of_resamples_are_those_of_the_rows_repeated(name):
    """Several runs and resamples at once, against the library's score of each."""
    generator = np.random.default_rng(0)
    references = generator.integers(2, size=12)
    predictions = generator.integers(2, size=(4, 12))
    predictions[0] = 1  # a run that has collapsed
    if name in ("pearson", "spearmanr"):
        references = generator.random(12).round(1)  # with ties
        predictions = np.stack([references + generator.random(12).round(1), np.full(12, 0.1)])
    if name in ("macro_f1", "balanced_accuracy", "roc_auc"):  # three classes, absent in resamples
        references = generator.integers(3, size=12)
        predictions = generator.integers(3, size=(4, 12))
    if name == "roc_auc":
        logits = generator.normal(size=(4, 12, 3)).round()
        predictions = np.stack([probabilities_of(of_run) for of_run in logits])
    counts = generator.multinomial(12, np.full(12, 1 / 12), size=20)
    counts[0] = 12 * (np.arange(12) == 3)  # one row, twelve times
    scores = resampled_scores([name], predictions, references, counts)[name]
    assert scores.shape == (20, len(predictions))
    for resample, count in enumerate(counts):
        rows = np.repeat(np.arange(12), count)
        for number, values in enumerate(predictions):
            expected = reference_score(name, values[rows], references[rows])
            assert scores[resample, number] == pytest.approx(expected, abs=1e-12)


def test_nothing_predicted_as_class_1_gives_f1_of_0():
    assert compute(["f1"], np.zeros(4, int), np.array([0, 1, 1, 0])) == {"f1": 0.0}


def test_the_metric_is_an_evaluate_metric():
    import evaluate

    metric = glue_metric(["accuracy", "f1"], regression=False)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=PREDICTIONS, references=LABELS) == compute(
        ["accuracy", "f1"], PREDICTIONS, LABELS
    )


def test_importing_evaluate_skips_pipelines_and_statistics():
    """In a fresh process, since this one may have loaded them; afterwards they can be imported."""
    code = """
import sys
import transformers
from lib.training.metrics import glue_metric

metric = glue_metric(["accuracy", "f1"], regression=False)
assert metric.compute(predictions=[1, 1, 0], references=[1, 0, 0])["accuracy"] == 2 / 3
assert not {"transformers.pipelines", "scipy.stats", "sklearn"} & set(sys.modules)
assert sys.modules["transformers"] is transformers

import evaluate
import scipy.stats
from transformers import pipeline

glue_metric(["accuracy"], regression=False)
assert sys.modules["evaluate"] is evaluate
assert sys.modules["scipy.stats"] is scipy.stats
assert "transformers.pipelines" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loaded_modules_stay_where_evaluate_is_imported_later():
    code = """
import sys
import scipy.stats
from lib.training.metrics import glue_metric

glue_metric(["accuracy"], regression=False)
assert sys.modules["scipy.stats"] is scipy.stats
assert None not in sys.modules.values()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_glue_scores_a_task_by_the_mean_of_its_metrics():
    assert best_metric_name(["accuracy", "f1"]) == "combined_score"
    assert best_metric_name(["matthews_correlation"]) == "matthews_correlation"


def test_ranges_of_scores():
    assert score_range("f1", ["accuracy", "f1"]) == (0, 1)
    assert score_range("combined_score", ["accuracy", "f1"]) == (0, 1)
    assert score_range("matthews_correlation", ["matthews_correlation"]) == (-1, 1)
    assert score_range("combined_score", ["pearson", "spearmanr"]) == (-1, 1)
    for task in TASKS.values():  # the worst and the best predictions reach the ends
        for name in task.metrics:
            truth = np.array([0, 0, 1, 1])
            worst, best = (compute([name], answer, truth)[name] for answer in (1 - truth, truth))
            assert (worst, best) == pytest.approx(score_range(name, task.metrics))


def test_f1_is_displayed_with_its_class():
    assert display_name("f1", ("no", "yes")) == "f1 of 'yes'"
    assert display_name("accuracy", ("no", "yes")) == "accuracy"
    assert display_name("pearson", ()) == "pearson"


def test_interval_of_accuracy_is_that_of_the_binomial():
    low, high = confidence_intervals(["accuracy"], PREDICTIONS, LABELS, seed=0)["accuracy"]
    share = np.mean(PREDICTIONS == LABELS)
    error = 1.96 * np.sqrt(share * (1 - share) / 408)
    assert low == pytest.approx(share - error, abs=0.01)
    assert high == pytest.approx(share + error, abs=0.01)


def test_intervals_equal_the_bootstrap_of_scipy():
    expected = scipy.stats.bootstrap(
        (LABELS, PREDICTIONS),
        sklearn.metrics.f1_score,
        paired=True,
        vectorized=False,
        n_resamples=50,
        method="percentile",
        rng=5,  # the same rows: one resample after the other from NumPy's default generator
    )
    found = confidence_intervals(["f1"], PREDICTIONS, LABELS, seed=5, num_resamples=50)
    assert found == {"f1": tuple(expected.confidence_interval)}


def test_resamples_in_chunks_are_those_at_once(monkeypatch):
    runs = np.stack([PREDICTIONS, LABELS])
    at_once = bootstrap_scores(["f1"], runs, LABELS, seed=0, num_resamples=7)
    monkeypatch.setattr("lib.training.metrics.CHUNK_SIZE", 3 * 408)
    in_chunks = bootstrap_scores(["f1"], runs, LABELS, seed=0, num_resamples=7)
    assert at_once["f1"].tolist() == in_chunks["f1"].tolist()


def test_intervals_hold_the_truth_95_times_of_100():
    held = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        truth = rng.integers(2, size=200)
        predictions = np.where(rng.random(200) < 0.85, truth, 1 - truth)
        low, high = confidence_intervals(
            ["accuracy"], predictions, truth, seed=trial, num_resamples=200
        )["accuracy"]
        held += low <= 0.85 <= high
    assert 86 <= held <= 100  # 95 expected; below 86 has a chance of 1 in 3,000


def test_loss_equals_torch():
    logits = RNG.normal(size=(9, 3)).astype(np.float32)
    labels = RNG.integers(3, size=9)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert mean_loss(logits, labels) == pytest.approx(expected.item(), abs=1e-6)
    assert mean_loss(np.array([[1.0], [3.0]]), np.array([2.0, 5.0])) == pytest.approx(2.5)


def test_probabilities_and_losses_equal_scipy_to_the_last_bit():
    for num_classes in (2, 3, 7):
        logits = (RNG.normal(size=(500, num_classes)) * 9).astype(np.float32)
        labels = RNG.integers(num_classes, size=500)
        exact = logits.astype(np.float64)
        expected = -scipy.special.log_softmax(exact, axis=1)[np.arange(500), labels]
        assert probabilities_of(logits).tolist() == scipy.special.softmax(exact, axis=1).tolist()
        assert row_losses(logits, labels).tolist() == expected.tolist()
    assert probabilities_of(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
    assert row_losses(np.array([[1e4, 0.0]]), np.array([1])).tolist() == [1e4]


def test_predictions_and_probabilities():
    logits = np.array([[0.0, np.log(3)], [5.0, 5.0]])
    assert predictions_of(logits).tolist() == [1, 0]
    assert probabilities_of(logits)[0].tolist() == pytest.approx([0.25, 0.75])
    assert predictions_of(np.array([[2.5]])).tolist() == [2.5]


def test_a_single_predicted_class_is_a_collapse():
    assert collapsed_class(np.array([1, 1, 1])) == 1
    assert collapsed_class(np.array([1, 0, 1])) is None


def test_withheld_labels_do_not_count_as_labels():
    assert has_labels(np.array([0, 1]))
    assert not has_labels(np.array([-100, -100]))
