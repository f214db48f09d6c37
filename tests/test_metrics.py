import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from lib.training.metrics import (
    best_metric_name,
    collapsed_class,
    compute,
    confidence_intervals,
    glue_metric,
    has_labels,
    mean_loss,
    predictions_of,
    probabilities_of,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(2, size=408)
ANSWERS = np.where(RNG.random(408) < 0.8, LABELS, 1 - LABELS)


def test_scores_by_hand():
    # Of 5 rows 3 are right; class 1: 2 found, 1 false alarm, 1 missed -> F1 = 4 / (4 + 1 + 1).
    scores = compute(["accuracy", "f1"], np.array([1, 1, 0, 1, 0]), np.array([1, 1, 0, 0, 1]))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["combined_score"] == pytest.approx((3 / 5 + 2 / 3) / 2)


def test_scores_equal_scikit_learn():
    scores = compute(["accuracy", "f1", "matthews_correlation"], ANSWERS, LABELS)
    assert scores["accuracy"] == sklearn.metrics.accuracy_score(LABELS, ANSWERS)
    assert scores["f1"] == sklearn.metrics.f1_score(LABELS, ANSWERS)
    assert scores["matthews_correlation"] == sklearn.metrics.matthews_corrcoef(LABELS, ANSWERS)


def test_correlations_equal_scipy_and_a_constant_has_none():
    scores, truth = RNG.random(50), RNG.random(50)
    computed = compute(["pearson", "spearmanr"], scores, truth)
    assert computed["pearson"] == pytest.approx(np.corrcoef(scores, truth)[0, 1])
    ranks = scipy.stats.rankdata(scores), scipy.stats.rankdata(truth)
    assert computed["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert compute(["pearson"], np.ones(50), truth) == {"pearson": 0.0}


def test_nothing_predicted_as_class_1_gives_f1_of_0():
    assert compute(["f1"], np.zeros(4, int), np.array([0, 1, 1, 0])) == {"f1": 0.0}


def test_the_metric_is_one_of_evaluate():
    import evaluate

    metric = glue_metric(["accuracy", "f1"], regression=False)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=ANSWERS, references=LABELS) == compute(
        ["accuracy", "f1"], ANSWERS, LABELS
    )


def test_glue_scores_a_task_by_the_mean_of_its_metrics():
    assert best_metric_name(["accuracy", "f1"]) == "combined_score"
    assert best_metric_name(["matthews_correlation"]) == "matthews_correlation"


def test_interval_of_accuracy_is_that_of_the_binomial():
    low, high = confidence_intervals(["accuracy"], ANSWERS, LABELS, seed=0)["accuracy"]
    share = np.mean(ANSWERS == LABELS)
    error = 1.96 * np.sqrt(share * (1 - share) / 408)
    assert low == pytest.approx(share - error, abs=0.01)
    assert high == pytest.approx(share + error, abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        truth = rng.integers(2, size=200)
        answers = np.where(rng.random(200) < 0.85, truth, 1 - truth)
        low, high = confidence_intervals(
            ["accuracy"], answers, truth, seed=trial, num_resamples=200
        )["accuracy"]
        held += low <= 0.85 <= high
    assert 86 <= held <= 100  # 95 expected; below 86 has a chance of 1 in 3,000


def test_loss_equals_torch():
    logits = RNG.normal(size=(9, 3)).astype(np.float32)
    labels = RNG.integers(3, size=9)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert mean_loss(logits, labels) == pytest.approx(expected.item(), abs=1e-6)
    assert mean_loss(np.array([[1.0], [3.0]]), np.array([2.0, 5.0])) == pytest.approx(2.5)


def test_answers_and_probabilities():
    logits = np.array([[0.0, np.log(3)], [5.0, 5.0]])
    assert predictions_of(logits).tolist() == [1, 0]
    assert probabilities_of(logits)[0].tolist() == pytest.approx([0.25, 0.75])
    assert predictions_of(np.array([[2.5]])).tolist() == [2.5]


def test_a_classifier_that_says_one_thing_is_found_out():
    assert collapsed_class(np.array([1, 1, 1])) == 1
    assert collapsed_class(np.array([1, 0, 1])) is None


def test_withheld_labels_are_no_labels():
    assert has_labels(np.array([0, 1]))
    assert not has_labels(np.array([-100, -100]))
