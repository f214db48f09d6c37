"""Validation rows that are cut from the training rows."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import NUM_TRAIN, write_csv
from row_files import load
from runs import run
from sklearn.model_selection import StratifiedKFold

from lib.compare.runs import read_run
from lib.data.rows.holdout import Holdout, held_out
from lib.data.splits import load_splits
from lib.errors import InputError

LABELS = np.array([0] * 40 + [1] * 14 + [2] * 6)
DISTINCT = np.arange(60, dtype=np.uint64)


def test_a_share_is_the_same_of_each_class():
    mask = held_out(LABELS, DISTINCT, Holdout(seed=1, share=0.25))
    assert mask.sum() == 15
    counts = np.bincount(LABELS[mask])
    assert np.abs(counts - np.array([10, 3.5, 1.5])).max() < 1
    again = held_out(LABELS, DISTINCT, Holdout(seed=1, share=0.25))
    other = held_out(LABELS, DISTINCT, Holdout(seed=2, share=0.25))
    assert (mask == again).all()
    assert (mask != other).any()


@pytest.mark.parametrize("num_folds", [2, 3, 4, 6])
def test_folds_hold_each_row_once_as_evenly_as_those_of_scikit_learn(num_folds):
    masks = np.array(
        [held_out(LABELS, DISTINCT, Holdout(3, folds=num_folds, fold=f)) for f in range(num_folds)]
    )
    assert (masks.sum(axis=0) == 1).all()
    theirs = StratifiedKFold(num_folds, shuffle=True, random_state=0).split(LABELS, LABELS)
    for name, parts in (("ours", masks), ("theirs", [rows for _, rows in theirs])):
        counts = np.array([np.bincount(LABELS[part], minlength=3) for part in parts])
        assert np.ptp(counts, axis=0).max() <= 1, name
        assert np.ptp(counts.sum(axis=1)) <= (1 if name == "ours" else 3), name


def test_rows_of_equal_texts_stay_together():
    hashes = np.repeat(np.arange(20, dtype=np.uint64), 3)
    for fold in range(4):
        mask = held_out(LABELS, hashes, Holdout(0, folds=4, fold=fold))
        assert (mask.reshape(20, 3) == mask.reshape(20, 3)[:, :1]).all()
        assert 0 < mask.sum() < 30


def test_the_cut_does_not_depend_on_the_values_of_the_hashes():
    """Another version of pandas may hash texts otherwise."""
    others = np.random.default_rng(0).permutation(60).astype(np.uint64)
    for holdout in (Holdout(4, share=0.3), Holdout(4, folds=3, fold=1)):
        ours, theirs = (held_out(LABELS, hashes, holdout) for hashes in (DISTINCT, others))
        assert (ours == theirs).all()


def test_scores_are_stratified_by_tenths():
    scores = np.random.default_rng(0).permutation(np.linspace(0, 5, 200))
    mask = held_out(scores, np.arange(200, dtype=np.uint64), Holdout(0, share=0.2))
    assert np.bincount((scores[mask] / 5.0001 * 10).astype(int)).tolist() == [4] * 10


@pytest.fixture
def rows():
    return [
        {"text": f"text {row // 2 if row < 20 else row}", "label": row % 2} for row in range(80)
    ]


def test_the_rows_are_cut_as_their_numbers_say(tmp_path, rows):
    path = write_csv(tmp_path / "rows.csv", rows)
    splits = load_splits({"train": str(path)}, task_name=None, holdout=Holdout(0, share=0.25))
    validation = splits.validation["validation"]
    assert len(splits.train) + len(validation) == 80
    assert 18 <= len(validation) <= 22
    held = set(splits.held_out.tolist())
    assert validation["text"][:] == [rows[row]["text"] for row in sorted(held)]
    assert splits.train["text"][:] == [r["text"] for row, r in enumerate(rows) if row not in held]
    assert not set(validation["text"][:]) & set(splits.train["text"][:])
    assert Counter(validation["labels"][:]).keys() == {0, 1}
    shutil.copy(path, tmp_path / "moved.csv")
    moved = load_splits(
        {"train": str(tmp_path / "moved.csv")}, task_name=None, holdout=Holdout(0, share=0.25)
    )
    other = load_splits({"train": str(path)}, task_name=None, holdout=Holdout(1, share=0.25))
    assert moved.fingerprint() == splits.fingerprint() != other.fingerprint()
    assert splits.first(None, 5, None).held_out.tolist() == sorted(held)[:5]


def test_too_few_rows_to_cut(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [{"text": f"{n}", "label": n} for n in range(3)])
    for holdout, message in (
        (Holdout(0, share=0.1), "--validation_share 0.1 of the 3 rows of .*leaves no validation"),
        (Holdout(0, folds=5, fold=4), "--folds 5 --fold 4 of the 3 rows of .*no validation"),
        (Holdout(0, share=0.9), "--validation_share 0.9 of the 3 rows of .*no training"),
    ):
        with pytest.raises(InputError, match=message):
            load_splits({"train": str(path)}, task_name=None, holdout=holdout)


def test_a_validation_split_that_is_not_used_is_said(tmp_path, rows):
    for name in ("train", "validation"):
        write_csv(
            tmp_path / f"{name}.csv",
            [{"sentence1": "a", "sentence2": f"{n}", "label": n % 2} for n in range(20)],
        )
    splits = load_splits(str(tmp_path), task_name="mrpc", holdout=Holdout(0, share=0.25))
    assert len(splits.validation["validation"]) == 5
    assert "its own validation split is not used, as --validation_share 0.25" in splits.notices[0]
    assert load(tmp_path / "train.csv").notices == ()


def test_a_run_keeps_the_numbers_of_its_validation_rows(flags, files, tmp_path):
    chosen = [flag for flag in flags if not flag.startswith("--validation_file")]
    results = run(
        chosen, tmp_path / "out", "--folds=4", "--fold=1", "--max_train_steps=2", report=True
    )
    held = json.loads((tmp_path / "out" / "validation_rows.json").read_text())["rows"]
    assert results["eval_num_rows"] == len(held)
    compared = read_run(tmp_path / "out")
    assert (compared.num_train, len(compared.labels)) == (NUM_TRAIN - len(held), len(held))
    labels = [
        line.rstrip().rpartition(",")[2] for line in files["train"].read_text().splitlines()[1:]
    ]
    lines = (tmp_path / "out" / "predictions" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [labels[row] for row in held]
    assert f"{len(held)} rows of `train.csv`" in (tmp_path / "out" / "README.md").read_text()
