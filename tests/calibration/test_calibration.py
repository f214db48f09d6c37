"""The threshold and the temperature: what is fitted, and that its score is not flattered."""

import json

import numpy as np
import pytest
from runs import run
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, f1_score, log_loss

from lib.calibration.cross_fitting import NUM_FOLDS, assign_folds, calibrate
from lib.calibration.decision import Decision, read_decision
from lib.calibration.temperature import fit_temperature
from lib.calibration.threshold import decide, fit_threshold
from lib.errors import InputError
from lib.report.results import write_report
from lib.training.curves import calibration_bins, expected_calibration_error
from lib.training.metrics import mean_loss, probabilities_of

MRPC = ("accuracy", "f1")


def made_up(num_rows, *, seed, overconfidence=1.0, shift=0.0):
    """Two-class logits whose margin, over `overconfidence` and less `shift`, is the log-odds."""
    generator = np.random.default_rng(seed)
    odds = generator.normal(0.7, 2, num_rows)
    labels = (generator.random(num_rows) < 1 / (1 + np.exp(-odds))).astype(int)
    margin = odds * overconfidence + shift
    return np.stack([-margin / 2, margin / 2], axis=1).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(5))
def test_the_temperature_is_that_of_scipy(seed):
    logits = np.random.default_rng(seed).normal(0, 3, (50, 3))
    labels = np.random.default_rng(seed + 9).integers(3, size=50)
    labels[:30] = logits[:30].argmax(axis=1)
    found = minimize_scalar(
        lambda inverse: mean_loss(logits * inverse, labels), bounds=(0.1, 10), method="bounded"
    )
    assert fit_temperature(logits, labels) == pytest.approx(1 / found.x, rel=1e-4)


def test_the_temperature_undoes_a_factor_and_stays_in_its_bounds():
    logits, labels = made_up(20_000, seed=0, overconfidence=2.5)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    assert fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(0.1)
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(10)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_is_better(seed):
    logits, labels = made_up(50, seed=seed, shift=1.0)
    probabilities = probabilities_of(logits)[:, 1]
    threshold = fit_threshold(probabilities, labels, MRPC)

    def combined(cut):
        answers = probabilities > cut
        return (accuracy_score(labels, answers) + f1_score(labels, answers)) / 2

    assert combined(threshold) == pytest.approx(max(map(combined, probabilities)))


def test_of_equal_thresholds_the_one_closest_to_a_half():
    probabilities, labels = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    assert fit_threshold(probabilities, labels, MRPC) == 0.5
    assert fit_threshold(probabilities / 2, labels, MRPC) == pytest.approx(0.25)
    assert fit_threshold(np.full(4, 0.3), labels, MRPC) == 0.5
    assert decide(np.array([0.5, 0.51]), 0.5).tolist() == [0, 1]


def test_each_fold_has_its_share_of_each_class():
    labels = np.array([0] * 13 + [1] * 31)
    folds = assign_folds(labels, seed=3)
    for label in (0, 1):
        counts = np.bincount(folds[labels == label], minlength=NUM_FOLDS)
        assert np.ptp(counts) <= 1
    assert (folds == assign_folds(labels, seed=3)).all()
    assert (folds != assign_folds(labels, seed=4)).any()


def test_scores_are_those_of_rows_that_the_fit_has_not_seen():
    """Recomputed fold by fold with scikit-learn's metrics."""
    logits, labels = made_up(120, seed=1, overconfidence=2.0, shift=0.8)
    found = calibrate(logits, labels, MRPC, seed=3)
    folds = assign_folds(labels, seed=3)
    plain = probabilities_of(logits)[:, 1]
    answers, scaled = np.empty(120, int), np.empty((120, 2))
    for fold in range(NUM_FOLDS):
        inside, outside = folds == fold, folds != fold
        answers[inside] = plain[inside] > fit_threshold(plain[outside], labels[outside], MRPC)
        divisor = fit_temperature(logits[outside], labels[outside])
        scaled[inside] = probabilities_of(logits[inside] / divisor)
    threshold, temperature = found["threshold"]["scores"], found["temperature"]["scores"]
    assert threshold["f1"]["cross_fitted"] == pytest.approx(f1_score(labels, answers))
    assert threshold["f1"]["plain"] == pytest.approx(f1_score(labels, plain > 0.5))
    assert temperature["loss"]["cross_fitted"] == pytest.approx(log_loss(labels, scaled))
    ece = expected_calibration_error(*calibration_bins(scaled, labels))
    assert temperature["ece"]["cross_fitted"] == pytest.approx(ece)
    ece = expected_calibration_error(*calibration_bins(probabilities_of(logits), labels))
    assert temperature["ece"]["plain"] == pytest.approx(ece)
    for score in (*threshold.values(), *temperature.values()):
        assert score["ci95"][0] < score["cross_fitted"] < score["ci95"][1]
    assert temperature["loss"]["difference_ci95"][1] < 0  # a factor of two is found in 120 rows


def test_cross_fitting_does_not_promise_what_new_rows_do_not_keep():
    """A model whose threshold is right already: what fitting seems to gain, new rows lose."""
    gains = {"own_rows": [], "cross_fitted": [], "new_rows": []}
    for seed in range(20):
        logits, labels = made_up(408, seed=seed)
        scores = calibrate(logits, labels, ("accuracy",), seed=seed)["threshold"]
        accuracy = scores["scores"]["accuracy"]
        for name in ("own_rows", "cross_fitted"):
            gains[name].append(accuracy[name] - accuracy["plain"])
        new_logits, new_labels = made_up(20_000, seed=1000 + seed)
        new = probabilities_of(new_logits)[:, 1]
        gains["new_rows"].append(
            accuracy_score(new_labels, new > scores["value"])
            - accuracy_score(new_labels, new > 0.5)
        )
    mean = {name: float(np.mean(values)) for name, values in gains.items()}
    assert mean["own_rows"] > 0.005
    assert mean["new_rows"] < 0
    assert mean["cross_fitted"] < 0


def test_nothing_is_fitted_to_scores_or_to_a_handful_of_rows():
    logits, labels = made_up(19, seed=0)
    assert calibrate(logits, labels, MRPC, seed=0) == {}
    assert calibrate(np.zeros((100, 1)), np.zeros(100), ("pearson",), seed=0) == {}
    three = np.random.default_rng(0).normal(size=(60, 3))
    assert "threshold" not in calibrate(three, three.argmax(axis=1), ("accuracy",), seed=0)


def test_a_run_stores_both_for_those_who_ask(once, flags, tmp_path):
    """A second stage from this folder does not take them over."""
    found = json.loads((once / "all_results.json").read_text())["calibration"]
    config = json.loads((once / "config.json").read_text())
    assert config["calibration"] == {
        name: found[name]["value"] for name in ("temperature", "threshold")
    }
    few = ["--max_eval_samples=10", "--num_train_epochs=1", f"--model_name_or_path={once}"]
    run(flags, tmp_path / "second", *few)
    assert "calibration" not in json.loads((tmp_path / "second" / "config.json").read_text())


def test_the_report_shows_them_beside_the_plain_scores(once):
    write_report(once)
    page = (once / "report" / "index.html").read_text()
    results = json.loads((once / "all_results.json").read_text())
    for name in ("threshold", "temperature"):
        assert f"<td>{name} {results['calibration'][name]['value']:.3f}</td>" in page
    score = results["calibration"]["threshold"]["scores"]["f1"]
    assert score["plain"] == pytest.approx(results["eval_f1"])
    assert f"<td>{score['plain']:.4f}</td><td>{score['cross_fitted']:.4f}</td>" in page


def test_the_fitted_threshold_decides_the_same_at_any_temperature(once):
    logits, _ = made_up(300, seed=5)
    fitted = json.loads((once / "config.json").read_text())["calibration"]["threshold"]
    expected = probabilities_of(logits)[:, 1] > fitted
    for temperature in (None, "fitted", "0.3", "4"):
        decision = read_decision(once, 2, "fitted", temperature)
        assert (decision.decide(logits)[0] == expected).all()
    cut = read_decision(once, 2, "0.9", "3")
    assert cut == Decision(0.9, 3.0)
    answers, probabilities = cut.decide(logits)
    assert probabilities == pytest.approx(probabilities_of(logits / 3))
    assert (answers == (probabilities[:, 1] > 0.9)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, "0.5", None), "--threshold decides between two classes; .* has 3"),
        ((1, None, "fitted"), "--temperature scales probabilities; .* predicts scores"),
        ((2, "1", None), "--threshold must be fitted or a number between 0 and 1, got '1'"),
        ((2, None, "hot"), "--temperature must be fitted or a number above 0, got 'hot'"),
        ((2, None, "nan"), "--temperature must be fitted or a number above 0, got 'nan'"),
        ((2, "fitted", None), "--threshold fitted: config.json holds none"),
    ],
)
def test_refuses_what_was_not_fitted_or_makes_no_sense(tmp_path, arguments, message):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        read_decision(tmp_path, *arguments)
