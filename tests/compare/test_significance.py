"""The statistics of comparing runs: by hand, by SciPy, and by simulation."""

import numpy as np
import pytest
import scipy.stats
from compared_runs import LABELS, wrong_in

from lib.compare.significance import difference_of_means, holm, score_covariances, summarize
from lib.training import metrics


def test_covariances_over_rows_are_those_of_means():
    # Accuracy is a mean, so its covariance over samples is that of the rows over their number.
    generator = np.random.default_rng(0)
    references = generator.integers(2, size=100)
    predictions = np.where(generator.random((3, 100)) < 0.8, references, 1 - references)
    found = score_covariances(["accuracy"], predictions, references, seed=0)["accuracy"]
    expected = np.cov(predictions == references, ddof=0) / 100
    assert found == pytest.approx(expected, abs=0.05 * expected.max())


def test_without_row_noise_the_test_equals_welch():
    a, b = np.array([0.80, 0.82, 0.84]), np.array([0.70, 0.75, 0.76, 0.81])
    found = difference_of_means(a, b, np.zeros((7, 7)))
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees_of_freedom == pytest.approx(expected.df)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_parts_of_the_variance_by_hand():
    # Variances of 4, covariances of 1 within a set and of 0.5 between: rows alone give runs of
    # a set a variance of 4 - 1 = 3, their mean of three 1, and the sets 1 + 1 - 2 * 0.5 = 1 more.
    covariance = np.full((6, 6), 0.5)
    covariance[:3, :3] = covariance[3:, 3:] = 1
    np.fill_diagonal(covariance, 4)
    same = difference_of_means(np.full(3, 0.8), np.full(3, 0.7), covariance)
    assert same.standard_error == pytest.approx((1 + 1 + 1) ** 0.5)
    assert same.degrees_of_freedom == pytest.approx(3**2 / (1 / 2 + 1 / 2))
    # Runs of A further apart than their rows explain: 16 / 3 instead of 1.
    apart = difference_of_means(np.array([-4.0, 0, 4]), np.full(3, 0.7), covariance)
    assert apart.standard_error == pytest.approx((16 / 3 + 1 + 1) ** 0.5)


def test_paired_seeds_without_row_noise_are_a_paired_t_test():
    a, b = np.array([0.80, 0.82, 0.84, 0.79]), np.array([0.78, 0.81, 0.81, 0.75])
    found = difference_of_means(a, b, np.zeros((8, 8)), paired=True)
    expected = scipy.stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees_of_freedom == 3
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_paired_seeds_give_what_mrmcaov_publishes():
    """Five readers, two tests: the data of Van Dyke et al. (1993), as MRMCaov 0.2 analyzes them.

    Source: Smith and Hillis (2020), doi:10.1117/12.2549075, and the package's README: the table
    "Obuchowski-Rockette variance component and covariance estimates" and the one below it.
    """
    num_readers = 5
    treatment_reader, cov1, cov2, cov3 = 0.0005510306, 0.0003466137, 0.0003440748, 0.0002390284
    # Any differences with its mean and its mean square of treatment and reader, half of their
    # variance, will do.
    spread = np.array([-2, -1, 0, 1, 2])
    spread = spread * np.sqrt(2 * treatment_reader / np.var(spread, ddof=1))
    scores = np.concatenate([0.8970370 + spread, np.full(num_readers, 0.9408374)])
    same, other = np.full((5, 5), cov2), np.full((5, 5), cov3)
    np.fill_diagonal(same, 0.0008022883)  # "Error"
    np.fill_diagonal(other, cov1)
    covariance = np.block([[same, other], [other, same]])
    found = difference_of_means(scores[:5], scores[5:], covariance, paired=True)
    assert found.difference == pytest.approx(-0.04380032, abs=1e-7)
    assert found.standard_error == pytest.approx(0.02074862, abs=1e-8)
    assert found.degrees_of_freedom == pytest.approx(15.25967, abs=1e-4)
    assert found.interval == pytest.approx((-0.0879594986, 0.0003588544), abs=1e-7)
    assert found.p_value == pytest.approx(0.05166569, abs=1e-6)


def test_holm_by_hand():
    # The smallest of four times 4, the next times 3, ..., none smaller than the one before.
    assert holm([0.02, 0.01, 0.4, 0.03]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_detectable_difference_is_found_as_often_as_stated():
    # Four runs of each with the same rows right: a plain t test, whose power SciPy gives.
    a, b = np.array([-1.0, 1, -1, 1]), np.array([-1.0, -1, 1, 1])
    found = difference_of_means(a, b, np.zeros((8, 8)))
    threshold = scipy.stats.t.ppf(0.975, found.degrees_of_freedom)
    noncentral = found.detectable / found.standard_error
    power = scipy.stats.nct.sf(threshold, found.degrees_of_freedom, noncentral)
    assert power == pytest.approx(0.8, abs=0.03)


def test_two_models_are_compared_row_by_row():
    # Right and wrong in the same rows but for one of ten: the variance is that of one row.
    a, b = wrong_in(0), wrong_in(0, 1)
    covariance = score_covariances(["accuracy"], np.stack([a, b]), LABELS, seed=0)["accuracy"]
    found = difference_of_means(np.array([0.9]), np.array([0.8]), covariance)
    assert found.standard_error == pytest.approx((0.1 * 0.9 / 10) ** 0.5, rel=0.05)
    assert found.distinguishable is None


def test_identical_scores_do_not_differ():
    found = difference_of_means(np.full(3, 0.7), np.full(3, 0.7), np.zeros((6, 6)))
    assert (found.p_value, found.distinguishable) == (1, False)


def test_summary_by_hand():
    found = summarize([1.0, 2.0, 3.0, 4.0])
    # Student's t for three degrees of freedom: 3.182; sd: sqrt(5 / 3).
    assert found.interval == pytest.approx((2.5 - 2.054, 2.5 + 2.054), abs=1e-3)
    assert summarize([1.0, 2.0, 3.0, 4.0], (1, 4)).interval == (1, 4)


NUM_ROWS = 200


def simulated(generator, sizes, *, seeds, rows, recipes, better=0.0):
    """Simulate runs of two recipes, equal in expectation if `better` is 0, and test them.

    A run predicts a row correctly if a sum of normal deviates is positive: the easiness of the row
    (standard deviation `rows`, for both recipes), one for each row and recipe (`recipes`), one for
    each seed (`seeds`, for all its rows), and one for each prediction (1).
    """
    labels = generator.random(NUM_ROWS) < 0.68
    easiness = 1 + generator.normal(0, rows, NUM_ROWS)
    right = np.concatenate(
        [
            easiness
            + shift
            + generator.normal(0, recipes, NUM_ROWS)
            + generator.normal(0, seeds, (size, 1))
            + generator.normal(0, 1, (size, NUM_ROWS))
            > 0
            for size, shift in zip(sizes, (better, 0.0), strict=True)
        ]
    )
    predictions, labels = np.where(right, labels, ~labels).astype(int), labels.astype(int)
    names = ["accuracy", "f1"]
    covariance = score_covariances(
        names, predictions, labels, seed=int(generator.integers(2**32)), num_resamples=200
    )["combined_score"]
    ones = np.ones((1, NUM_ROWS))
    scores = metrics.resampled_scores(names, predictions, labels, ones)["combined_score"][0]
    return difference_of_means(scores[: sizes[0]], scores[sizes[0] :], covariance).distinguishable


SITUATIONS = {
    "only rows": {"seeds": 0.0, "rows": 1.5, "recipes": 0.0},
    "seeds differ a little": {"seeds": 0.15, "rows": 1.5, "recipes": 0.0},
    "seeds differ much": {"seeds": 0.5, "rows": 1.5, "recipes": 0.0},
    "recipes are good at other rows": {"seeds": 0.0, "rows": 1.0, "recipes": 1.0},
}


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_equal_recipes_are_called_different_at_most_as_often_as_stated(situation, sizes):
    generator = np.random.default_rng(0)
    trials = 300
    different = sum(simulated(generator, sizes, **SITUATIONS[situation]) for _ in range(trials))
    # A test with an error rate of 5% is above this bound once in a thousand.
    assert different <= scipy.stats.binom.ppf(0.999, trials, 0.05)


def test_a_real_difference_is_found():
    generator = np.random.default_rng(0)
    situation = SITUATIONS["seeds differ a little"]
    found = sum(simulated(generator, (5, 5), **situation, better=0.6) for _ in range(50))
    assert found >= 40
