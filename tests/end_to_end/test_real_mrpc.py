"""The real MRPC and a real BERT vocabulary, where they are available."""

import subprocess

import pytest
from conftest import SHARED

from lib.cli.parsing import parse_arguments
from train_mrpc import main

MRPC = SHARED / "data" / "glue_mrpc"
GET_MINILM = SHARED / "models" / "get_minilm"

pytestmark = pytest.mark.skipif(not MRPC.is_dir(), reason=f"the real MRPC is not in {MRPC}")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    if not GET_MINILM.exists():
        pytest.skip(f"a model with BERT's vocabulary is not available: no {GET_MINILM}")
    folder = tmp_path_factory.mktemp("minilm")
    done = subprocess.run([GET_MINILM, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a model with BERT's vocabulary is not available: {done.stderr.strip()}")
    return folder


@pytest.fixture(scope="module")
def described(minilm):
    """The lines of `--dry_run` with the default batch of 32, by their names."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(
            parse_arguments(
                [f"--dataset_name={MRPC}", f"--model_name_or_path={minilm}", "--dry_run"]
            )
        )
    return {line[:23].strip(): line[23:] for line in printed.getvalue().splitlines()}


def test_reads_all_rows(described):
    assert described["train"] == "3,668 rows"
    assert described["validation"] == "408 rows"
    assert described["test"] == "1,725 rows, 1,725 without labels"
    assert described["labels"] == "not_equivalent, equivalent"


def test_tokens_and_shapes(described):
    """Expected lengths are those of BERT's uncased vocabulary on the first 8 training pairs."""
    assert described["token lengths"].startswith("50, 59, 47, 67, 59, 50, 62, 32 ")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert f"{name} 8 x 67" in described["as one batch"]
    assert "labels 8," in described["as one batch"]


def test_grouping_by_length_leaves_at_most_3_percent_of_padding(described):
    shares = [float(part.split()[-1].rstrip("%")) for part in described["padding"].split(", ")]
    _fixed, plain, here = shares
    assert here <= 3
    assert plain == pytest.approx(33, abs=4)


def test_updates_and_batches(described):
    # ceil(3668 / 32) = 115 batches of 31 or 32 rows.
    assert described["updates"].startswith("115 per epoch")
    assert described["global batch"] == "31 to 32 rows"
    assert described["processes"] == "1"


def test_predictions_in_glues_own_format(dropout_bert, tmp_path):
    flags = [f"--dataset_name={MRPC}", f"--model_name_or_path={dropout_bert}", "--max_length=64"]
    results = main(parse_arguments([*flags, f"--output_dir={tmp_path}", "--max_train_steps=2"]))
    assert results["eval_num_rows"] == 408
    assert not any(name.startswith("test_acc") for name in results)  # the labels are withheld
    header, *lines = (tmp_path / "predictions" / "MRPC.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [str(row) for row in range(1725)]
    assert {line.split("\t")[1] for line in lines} <= {"0", "1"}
