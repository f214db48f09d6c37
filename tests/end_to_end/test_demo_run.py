"""The demo, as `make demo` runs it."""

import json

import pytest
from conftest import run_script
from transformers import pipeline

from lib.demo.corpus import baselines, load_split


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run_script(["--demo", f"--output_dir={folder}"])
    assert done.returncode == 0, done.stderr
    return folder


def test_it_reaches_the_stated_accuracy(demo):
    results = json.loads((demo / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0.85
    assert results["eval_accuracy"] >= max(baselines().values()) + 0.10
    assert results["test_num_rows"] == 400


def test_the_saved_model_reproduces_the_written_predictions(demo):
    rows = load_split("validation")
    classify = pipeline("text-classification", str(demo))
    predictions = classify([{"text": r["sentence1"], "text_pair": r["sentence2"]} for r in rows])
    lines = (demo / "predictions" / "validation.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [prediction["label"] for prediction in predictions] == [
        line["prediction"] for line in written
    ]
    for prediction, line in zip(predictions, written, strict=True):
        assert prediction["score"] == pytest.approx(max(line["probabilities"].values()), abs=1e-4)
