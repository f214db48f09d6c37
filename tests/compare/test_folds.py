"""Runs whose validation rows were cut from the training rows: each pair has rows of its own."""

import numpy as np
import pytest
from compared_runs import LABELS, make_run, wrong_in
from scipy.stats import t as student
from test_comparison import compared, error_line

from lib.compare.significance import paired_difference

WRONG_A = ([0], [1, 2], [3], [], [4, 5])
WRONG_B = ([0, 1], [1, 2, 3], [3, 4, 5], [6], [4, 5])


def make_folds(folder, wrong, *, labels=LABELS, seed=0, **config):
    return [
        make_run(
            folder / f"s{seed}.f{fold}",
            wrong_in(*rows, labels=np.roll(labels, fold)),
            labels=np.roll(labels, fold),
            seed=seed,
            fingerprint=f"{seed}{fold}" * 32,
            folds=len(wrong),
            fold=fold,
            **config,
        )
        for fold, rows in enumerate(wrong)
    ]


def test_folds_are_compared_in_pairs_by_hand(tmp_path, capsys):
    a = make_folds(tmp_path / "a", WRONG_A)
    b = make_folds(tmp_path / "b", WRONG_B, learning_rate=1.0)
    content = compared(capsys, *a, "--against", *reversed(b))
    found = content["differences"]["B"]["metrics"]["accuracy"]
    differences = [0.1, 0.1, 0.2, 0.1, 0.0]
    assert found["difference"] == pytest.approx(0.1)
    # 10 validation rows for 40 training rows: s^2 = 0.02 / 4, times 1/5 + 1/4.
    assert found["standard_error"] == pytest.approx((0.005 * 0.45) ** 0.5)
    assert found["degrees_of_freedom"] == 4
    expected = 2 * student.sf(np.mean(differences) / (0.005 * 0.45) ** 0.5, 4)
    assert found["p_value"] == pytest.approx(expected)
    assert any("validate on different rows" in sentence for sentence in content["sentences"])
    assert not any("more seeds do not reduce" in sentence for sentence in content["sentences"])
    mean = content["sets"]["A"]["figures"]["eval_accuracy"]
    # Accuracies .9 .8 .9 1. .8; Student's t for four degrees of freedom is 2.776.
    half = 2.776 * (0.028 / 4 * 0.45) ** 0.5
    assert mean["interval"] == pytest.approx([0.88 - half, 1.0], abs=1e-4)


def test_folds_of_several_seeds(tmp_path, capsys):
    sets = [
        [*make_folds(tmp_path / name, wrong), *make_folds(tmp_path / name, wrong[::-1], seed=1)]
        for name, wrong in (("a", WRONG_A), ("b", WRONG_B))
    ]
    content = compared(capsys, *sets[0], "--against", *sets[1])
    assert content["differences"]["B"]["metrics"]["accuracy"]["degrees_of_freedom"] == 9


def test_folds_without_partners_are_refused(tmp_path, capsys):
    a, b = make_folds(tmp_path / "a", WRONG_A), make_folds(tmp_path / "b", WRONG_B)
    line = error_line(capsys, *a, "--against", *b[:4])
    assert f"{a[4]} (seed 0, fold 4) validates on rows of its own" in line
    assert "0 runs on them" in line
    assert "takes two pairs" in error_line(capsys, a[0], "--against", b[0])
    assert "has the recipe and the seed" in error_line(
        capsys, *a, make_run(tmp_path / "copy", wrong_in(7), fingerprint="00" * 32, folds=5, fold=0)
    )


def test_folds_of_other_rows_are_refused(tmp_path, capsys):
    a = make_folds(tmp_path / "a", WRONG_A)
    (tmp_path / "b").mkdir()
    other = make_run(tmp_path / "other", wrong_in(7), fingerprint="9" * 64, folds=5, fold=1)
    assert "was not evaluated on the data of" in error_line(capsys, *a, "--against", other)
    plain = make_run(tmp_path / "plain", wrong_in(7), fingerprint="00" * 32, seed=3)
    assert "validation rows of one of them were cut" in error_line(capsys, *a, "--against", plain)


def test_shares_of_several_seeds_are_pairs_too(tmp_path, capsys):
    a, b = (
        [
            make_run(
                tmp_path / name / str(seed),
                wrong_in(*rows),
                seed=seed,
                fingerprint=str(seed) * 64,
                validation_share=0.2,
            )
            for seed, rows in enumerate(wrong)
        ]
        for name, wrong in (("a", WRONG_A), ("b", WRONG_B))
    )
    content = compared(capsys, *a, "--against", *b)
    assert content["differences"]["B"]["metrics"]["accuracy"]["degrees_of_freedom"] == 4


def cross_validated(num_trials, num_rows=60, num_folds=5):
    """The score differences of two equal recipes: nearest means of one of two features each.

    The features are equally good; each trial draws rows, and cross-validates both on them.
    """
    generator = np.random.default_rng(0)
    for _ in range(num_trials):
        labels = generator.permutation(np.arange(num_rows) % 2)
        features = generator.normal(labels[:, None] * 1.0, 1.0, (num_rows, 2))
        scores = np.empty((2, num_folds))
        for fold in range(num_folds):
            held = np.arange(num_rows) % num_folds == fold
            for recipe in range(2):
                feature = features[:, recipe]
                zero, one = (feature[~held & (labels == label)].mean() for label in (0, 1))
                nearest = abs(feature[held] - one) < abs(feature[held] - zero)
                scores[recipe, fold] = (nearest == labels[held]).mean()
        yield scores


def test_equal_recipes_are_seldom_declared_different():
    """The plain paired t-test does so more often than the corrected one, which keeps its level."""
    trials = list(cross_validated(1500))
    corrected = np.mean([paired_difference(*scores, 1 / 4).p_value < 0.05 for scores in trials])
    plain = np.mean([paired_difference(*scores, 0.0).p_value < 0.05 for scores in trials])
    assert corrected <= 0.06
    assert corrected < plain
