"""Rows from files, and the errors that name a bad row."""

import functools
import gzip

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_csv
from row_files import ROWS, load, write

from lib.data.files import formats
from lib.data.tasks import IGNORED
from lib.errors import InputError


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    rows = [{**row, "sentence2": row["sentence2"].replace("\n", " ")} for row in ROWS]
    train = load(write(tmp_path, ending, rows)).train
    # "NA" and "null" are words here, not missing values.
    assert train["sentence1"][:] == ["a b", 'say "e"', "null"]
    assert train["sentence2"][:] == ["c, d", "NA", "ü x"]
    assert train["labels"][:] == [1, 0, 1]


def test_quoted_line_ends_stay_in_csv(tmp_path):
    assert load(write(tmp_path, "csv", ROWS)).train["sentence2"][2] == "ü\nx"


def test_string_labels_are_sorted_and_named(tmp_path):
    rows = [{"text": "x", "label": name} for name in ("spam", "ham", "eggs", "ham")]
    splits = load(write(tmp_path, "csv", rows))
    assert splits.task.labels == ("eggs", "ham", "spam")
    assert splits.train["labels"][:] == [2, 1, 0, 1]
    assert splits.task.columns == ("text",)


def test_number_labels_are_sorted_by_value(tmp_path):
    rows = [{"text": "x", "label": number} for number in (10, 9, 2)]
    splits = load(write(tmp_path, "csv", rows))
    assert splits.task.labels == ("2", "9", "10")
    assert splits.train["labels"][:] == [2, 1, 0]


def test_decimal_labels_are_scores(tmp_path):
    rows = [{"text": "x", "label": number} for number in (0.5, 4.25)]
    splits = load(write(tmp_path, "csv", rows))
    assert splits.task.metrics == ("pearson", "spearmanr")
    assert splits.train["labels"][:] == [0.5, 4.25]


def test_true_and_false_are_classes(tmp_path):
    rows = [{"text": "x", "label": value} for value in (True, False, True)]
    splits = load(write(tmp_path, "jsonl", rows))
    assert splits.task.labels == ("False", "True")
    assert splits.train["labels"][:] == [1, 0, 1]


def test_a_task_gives_files_its_labels_and_metrics(tmp_path):
    rows = [{"sentence1": "x", "sentence2": "y", "label": name} for name in ("not_entailment",)]
    splits = load(write(tmp_path, "csv", rows), task_name="rte")
    assert splits.task.labels == ("entailment", "not_entailment")
    assert splits.train["labels"][:] == [1]


def test_spaces_around_labels_are_removed_and_said(tmp_path):
    rows = [{"text": "x", "label": name} for name in ("yes", "yes ", "no", "\tyes")]
    splits = load(write(tmp_path, "csv", rows))
    assert splits.task.labels == ("no", "yes")
    assert splits.train["labels"][:] == [1, 1, 0, 1]
    assert "rows.csv: removed the spaces around 2 labels, such as 'yes '" in splits.notices[0]
    with pytest.raises(InputError, match="row 2, column label: the label is missing"):
        load(write(tmp_path, "csv", [*rows[:1], {"text": "x", "label": " "}]))


def test_a_tsv_that_pandas_quoted_is_read_with_a_warning(tmp_path):
    frame = pandas.DataFrame(
        {"text": ['say "e"', "plain", '"all of it"', 'a "'], "label": [0, 1, 0, 1]}
    )
    frame.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    splits = load(tmp_path / "rows.tsv")
    assert splits.train["text"][0] == '"say ""e"""'
    assert "rows.tsv: 3 texts keep the quotes that they were written in" in splits.notices[0]
    plain = [{"text": text, "label": 0} for text in ('"he said"', 'the "word"', "x")]
    assert load(write(tmp_path, "tsv", [*plain, {"text": "y", "label": 1}])).notices == ()


def test_labels_may_be_missing_in_the_test_split(tmp_path):
    train = write(tmp_path, "csv", ROWS)
    test = write_csv(tmp_path / "test.csv", [{"sentence1": "p", "sentence2": "q"}])
    assert load(train, test=test).test["test"]["labels"][:] == [IGNORED]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_rows_of_several_batches_stay_in_order(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 3)
    rows = [{"text": f"text {row}", "label": row} for row in range(10)]
    splits = load(write(tmp_path, ending, rows))
    assert splits.train["text"][:] == [f"text {row}" for row in range(10)]
    assert splits.train["labels"][:] == list(range(10))


def test_later_rows_may_have_decimals_and_more_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 2)
    rows = [{"text": "x", "label": label} for label in (1, 2, 2.5, 3)]
    train = load(write(tmp_path, "jsonl", [*rows, {"text": "y", "label": 4, "idx": 5}])).train
    assert train["labels"][:] == [1.0, 2.0, 2.5, 3.0, 4.0]


def test_finds_a_value_of_another_type_in_a_later_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 2)
    rows = [{"text": "x", "label": label} for label in (None, 1, 2, 3, "four")]
    with pytest.raises(InputError, match="row 5: label is 'four', and in the rows before 1:"):
        load(write(tmp_path, "jsonl", rows))


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.string_view()])
def test_text_of_polars_is_text(tmp_path, kind):
    """Polars and pandas write other types of text than Arrow's own."""
    columns = {"text": ["a", "b"], "label": ["yes", "no"]}
    table = pyarrow.table({name: pyarrow.array(column, kind) for name, column in columns.items()})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    train = load(tmp_path / "rows.parquet").train
    assert train[:] == {"text": ["a", "b"], "labels": [1, 0]}


def test_rereads_a_file_that_failed_half_way(tmp_path, monkeypatch):
    """The rows before the fault were already converted."""
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 1)
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\nx,0\ny,1\nz\n")
    for _ in range(2):
        with pytest.raises(InputError, match="row 3: 1 values"):
            load(path)


# Without the time, which would give the workers of pytest tests of different names.
zipped = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("csv", b"sentence1,sentence2\na,b\n", "no column label .found: sentence1, sentence2"),
        ("csv", b"a,b,c,label\n1,2,3,0\n", "cannot tell which columns are text"),
        ("csv", b"text,label\nx,0\ny\n", "row 2: 1 values where the header has 2"),
        ("csv", b"text,label\nx,0\ny,\n", "row 2, column label: the label is missing"),
        ("csv", b"text,label\n", "has no rows"),
        ("csv", b"text,label\nx,1\n,0\n", "row 2: text must be text, found nothing"),
        ("csv", b"text,label\nx,1\ny,1\n", "every row has the label '1'; a classifier needs two"),
        ("jsonl", b'{"text": "x", "label": [1]}', "label must hold one label for each row"),
        ("csv", b"text,text\nx,0\n", "two columns of one name"),
        ("csv", b"text,label\nx,0\n\xff\xfe,1\n", "line 3: invalid UTF-8 .byte 0xff."),
        (
            "jsonl",
            b'{"text": "x", "label": 0}\n{"text": }\n',
            "line 2, column 10 is not JSON: Expect",
        ),
        (
            "jsonl",
            b'{"text": "x", "label": 0}\n{"text": NaN, "label": 1}',
            "row 2: text must be text",
        ),
        (
            "jsonl",
            b'{"text": "x", "label": 0}\n{"label": 1}',
            "row 2: text must be text, found noth",
        ),
        (
            "csv",
            b"text,label\nx,0\ny,1\nz,xx\n",
            "row 3: label is 'xx', and .* before '0'",
        ),
        ("csv", b"text,label\nx,no\ny,yes\nz,nan\n", "row 3, column label: the label is missing"),
        ("csv", b"text,label\nx,0\nNaN,1\n", "row 2: text must be text, found 'NaN'"),
        ("csv", b"text,label\nx,1.0\ny,0.0\n", "whole numbers with a decimal point .'1.0'."),
        (
            "jsonl",
            b'{"text": "x", "label": 0}\n{"text": ["y"], "label": 1}',
            "row 2: text is ..y",
        ),
        ("json", b'{"text": "x", "label": 0}\n{"text": "y", "label": 1}', "name it .jsonl"),
        ("json", b"{1", "is not the JSON its name says"),
        ("csv", b'text,label\n"a" b,0\nx,1\n', "is not the CSV its name says: ',' expected after"),
        ("csv", b'text,label\nx,1\n"a,0\n', "is not the CSV its name says: unexpected end of data"),
        ("csv", b"text,label\n\nx,0\n\ny\n", "row 2: 1 values where the header has 2"),
        ("csv", b"text,label\n" + b"x,0\n" * 5000 + b"\xff,1\n", "line 5002: invalid UTF-8"),
        ("jsonl", b'{"text": "x", "label": 1' + b"0" * 30 + b"}", "Python int too large"),
        ("csv", b"labels,label\nx,0\ny,1\n", "cannot have the name labels; rename it"),
        ("parquet", b"text,label\nx,0\n", "is not the PARQUET its name says"),
        ("csv", b"text;label\nx;0\n", "separated by ';' .'text;label'., not by ',' as its name"),
        ("csv", b"text\tlabel\nx\t0\n", "not by ',' as its name says; name it .tsv"),
        ("tsv", b"text,label\nx,0\n", "separated by ',' .*name it .csv"),
        ("tsv", b'"text"\t"label"\n"x"\t"0"\n', "the header is in quotes, and TSV is read without"),
        ("jsonl", b'{"text": "x", "label": 0\n', "line 1, column 25 is not JSON: Expecting ','"),
        ("csv.gz", zipped(b"text,label\nx,0\ny\n"), "csv.gz, row 2: 1 values where"),
        ("csv.gz", zipped(b"text,label\nx,0\n\xff,1\n"), "csv.gz, line 3: invalid UTF-8"),
        ("csv.gz", zipped(b"text,label\nx,0\n")[:-4], "cannot be read: Truncated compress"),
        ("jsonl.bz2", b"BZh9 and no more", "cannot be read: "),
    ],
)
def test_bad_files_are_named_with_the_row(tmp_path, ending, content, message):
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert "bad." in str(error.value)
    assert "\n" not in str(error.value)


def test_validation_labels_must_be_known_from_training(tmp_path):
    train = write_csv(tmp_path / "train.csv", [{"text": "x", "label": n} for n in ("no", "yes")])
    other = write_csv(tmp_path / "dev.csv", [{"text": "x", "label": n} for n in ("yes", "maybe")])
    with pytest.raises(
        InputError, match="dev.csv, row 2, column label: unknown label 'maybe'.*: no, yes"
    ):
        load(train, other)


def test_a_number_is_no_index_of_the_users_label_names(tmp_path):
    train = write_csv(tmp_path / "train.csv", [{"text": "x", "label": n} for n in ("no", "yes")])
    other = write_csv(tmp_path / "dev.csv", [{"text": "x", "label": n} for n in (0, 1)])
    with pytest.raises(
        InputError, match="dev.csv, row 1, column label: unknown label '0'.*: no, yes"
    ):
        load(train, other)


def test_a_column_is_text_or_label(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    for more in ({"label_column": "sentence1"}, {"text_columns": ("sentence1", "sentence1")}):
        with pytest.raises(InputError, match="must differ"):
            load(path, **more)


def test_named_columns_must_exist(tmp_path):
    with pytest.raises(InputError, match="no column quote .found: sentence1, sentence2, label"):
        load(write(tmp_path, "csv", ROWS), text_columns=("quote",))


def test_first_rows_of_each_split(files):
    first = load(files["train"], files["validation"]).first(train=5, validation=3, test=None)
    assert (len(first.train), len(first.validation["validation"])) == (5, 3)
