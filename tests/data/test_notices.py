"""What is said of rows that are valid, but may not be what was meant."""

import re

import pytest
from conftest import MODEL_DIR, write_csv
from row_files import load
from runs import run
from transformers import AutoTokenizer

from lib.cli.parsing import parse_arguments
from lib.data.rows.notices import row_notices
from lib.data.tokenizing import encode_rows
from train_mrpc import main


@pytest.fixture
def notices(tmp_path):
    """The notices of training and validation rows, each a (text, label), at 16 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def of(train, validation):
        paths = [
            write_csv(tmp_path / f"{name}.csv", [{"text": t, "label": label} for t, label in rows])
            for name, rows in (("train", train), ("validation", validation))
        ]
        splits = load(*paths)
        settings = {"tokenizer": tokenizer, "columns": ["text"], "max_length": 16}
        tokenized = splits.map(
            encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=["text"],
            cache_key="notices",
            fn_kwargs=settings,
        )
        return list(row_notices(splits.task.labels, splits.all, tokenized.all, 16))

    return of


def test_rows_in_two_splits_are_counted(notices):
    train = [("a", 0), ("b", 1), ("c", 0)]
    assert notices(train, [("d", 0), ("e", 1)]) == []
    assert notices(train, [("b", 0), ("e", 1), ("b", 1)]) == [
        "2 of the 3 validation rows have the texts of a training row: their scores show what was "
        "learned by heart"
    ]


def test_unbalanced_classes_are_counted(notices):
    few = [(f"a{n}", "common") for n in range(9)] + [("b", "rare")]
    assert notices(few, [("x", "rare")]) == []
    many = [(f"a{n}", "common") for n in range(94)] + [("b", "rare"), ("c", "rare")]
    assert notices(many, [("x", "rare")]) == [
        "unbalanced classes: 94 training rows of 'common' and 2 of 'rare', 47:1; accuracy says "
        "little of 'rare'; see --class_weights balanced and --metric_for_best_model macro_f1"
    ]


def test_classes_of_nearly_one_name_are_named(notices):
    rows = [("a", "Yes"), ("b", "yes"), ("c", "no"), ("d", "yes")]
    assert notices(rows, [("x", "no")]) == [
        "'Yes' (1 training rows) and 'yes' (2 training rows) are not written alike, and different "
        "classes"
    ]


def test_truncated_rows_are_counted(notices):
    long = " ".join(["the"] * 15)  # 17 tokens with [CLS] and [SEP]
    assert notices([(long, 0), ("a", 1)], [("b", 0), (f"{long} c", 1)]) == [
        "truncated to --max_length 16 tokens, if longer: 1 of 2 train rows, 1 of 2 validation rows"
    ]


def test_a_run_and_a_dry_run_say_it_once(flags, files, tmp_path, capsys):
    same = f"--validation_file={files['train']}"
    run(flags, tmp_path / "out", same, "--max_train_steps=1")
    assert capsys.readouterr().err.count("53 of the 53 validation rows have the texts of a") == 1
    main(parse_arguments([*flags, same, "--dry_run", f"--output_dir={tmp_path / 'other'}"]))
    assert "notice                 53 of the 53 validation" in capsys.readouterr().out


def test_the_demo_has_nothing_to_say(notices, tmp_path, capsys):
    run(["--demo", "--max_train_steps=1"], tmp_path / "out")
    assert not re.search("rows", capsys.readouterr().err)
