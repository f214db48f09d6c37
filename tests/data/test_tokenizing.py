"""Rows are tokenized once, cached, and identified by a fingerprint."""

import shutil

import datasets
import pyarrow
import pytest
from row_files import ROWS, load, write
from transformers import AutoTokenizer

from lib.data import sources, splits
from lib.data.files import formats
from lib.data.splits import load_splits
from lib.data.tokenizing import model_columns, row_lengths
from lib.demo.corpus import MODEL_DIR


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_tokenized_rows_are_numbered_and_not_padded(files, tokenizer):
    splits = load(files["train"], files["validation"])
    tokenized = splits.tokenized(tokenizer, max_length=64)
    assert model_columns(tokenized.train) == ["input_ids", "token_type_ids", "attention_mask"]
    first = splits.train[0]
    expected = tokenizer(first["sentence1"], first["sentence2"])["input_ids"]
    assert tokenized.train[0]["input_ids"] == expected
    assert tokenized.train["row"][:] == list(range(len(splits.train)))
    assert row_lengths(tokenized.train).tolist() == [
        len(ids) for ids in tokenized.train["input_ids"]
    ]
    assert len(set(row_lengths(tokenized.train).tolist())) > 1


def test_long_rows_are_truncated(files, tokenizer):
    splits = load(files["train"], files["validation"])
    assert max(row_lengths(splits.tokenized(tokenizer, max_length=10).train)) == 10


def test_tokenized_once_and_cached(files, tokenizer, monkeypatch):
    splits = load(files["train"], files["validation"])
    splits.tokenized(tokenizer, max_length=40)
    tokenizer("something else", padding="max_length", max_length=7)  # changes the tokenizer's state
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized a second time")
    )
    load(files["train"], files["validation"]).tokenized(tokenizer, max_length=40)


def test_repeats_an_interrupted_tokenization(files, tokenizer, monkeypatch):
    monkeypatch.setattr(splits, "ROWS_PER_BATCH", 10)
    loaded = load(files["train"], files["validation"])
    calls = []
    encode = type(tokenizer).__call__

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            loaded.tokenized(tokenizer, max_length=41)
    assert loaded.tokenized(tokenizer, max_length=41).train["row"][:] == list(range(53))


def test_a_cached_start_reads_no_text(files, tokenizer, monkeypatch):
    def start():
        loaded = load(files["train"], files["validation"])
        return loaded.fingerprint(), loaded.tokenized(tokenizer, max_length=42).train[0]

    first = start()
    values_as_bytes = splits._values_as_bytes

    def of_labels(column):
        assert pyarrow.types.is_primitive(column.type), "read the texts again"
        return values_as_bytes(column)

    monkeypatch.setattr(splits, "_values_as_bytes", of_labels)
    monkeypatch.setattr(formats, "_READERS", {})
    assert start() == first


def test_the_fingerprint_follows_the_contents(tmp_path):
    one = load(write(tmp_path, "csv", ROWS))
    (tmp_path / "moved").mkdir()
    for ending in ("csv", "jsonl", "json", "parquet"):
        other = load(write(tmp_path / "moved", ending, ROWS))
        assert one.fingerprint() == other.fingerprint(), ending
    changed = [dict(row) for row in ROWS]
    changed[0] |= {"sentence1": "a", "sentence2": "bc, d"}  # the same characters, cut elsewhere
    for rows in (
        ROWS[::-1],
        ROWS[:2],
        changed,
        [{**row, "label": 1 - row["label"]} for row in ROWS],
    ):
        assert one.fingerprint() != load(write(tmp_path, "csv", rows)).fingerprint()


def test_the_fingerprint_does_not_depend_on_how_rows_are_stored(tmp_path, monkeypatch):
    whole = load(write(tmp_path, "csv", ROWS)).fingerprint()
    more = load(write(tmp_path, "csv", [*ROWS, *ROWS]))
    assert more.first(train=3, validation=3, test=None).fingerprint() == whole
    monkeypatch.setattr(formats, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr(sources, "READER_VERSION", "of this test")
    assert load(write(tmp_path, "csv", ROWS)).fingerprint() == whole


def test_the_fingerprint_tells_saved_rows_of_one_origin_apart(tmp_path):
    """A function given to `Dataset.map` may have read a file that has changed since."""
    fingerprints, contents = set(), set()
    for rows in (ROWS, ROWS[::-1]):
        split = datasets.Dataset(datasets.Dataset.from_list(rows).data, fingerprint="the same")
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.DatasetDict(train=split, validation=split).save_to_disk(str(tmp_path / "saved"))
        saved = datasets.load_from_disk(str(tmp_path / "saved"))
        fingerprints.add(saved["train"]._fingerprint)
        contents.add(load_splits(str(tmp_path / "saved"), task_name="mrpc").fingerprint())
    assert (len(fingerprints), len(contents)) == (1, 2)
