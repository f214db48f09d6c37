"""`python -m lib.export`: graphs that answer as the model does, in their own runtimes."""

import importlib.util
import json
import os
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import write_csv
from documentation import blocks, run_python
from runs import run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.export import main

PACKAGES = ("onnx", "onnxruntime", "onnxscript", "openvino")
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"needs {', '.join(PACKAGES)}: pip install -r requirements-dev.txt",
)

ROWS = [
    ("The council met.", "It met on Monday, and decided nothing that had not been decided before."),
    ("A short one.", "Another."),
    ("One more pair of sentences.", "Which differ in their lengths, as pairs do."),
]


@pytest.fixture(scope="module")
def exported(once, files, tmp_path_factory):
    """The folder of a finished run in which the commands of docs/exporting.md were given."""
    place = tmp_path_factory.mktemp("exporting")
    shutil.copytree(once, place / "outputs" / "mrpc")
    shutil.copy(files["test"], place / "pairs.csv")
    (code,) = blocks("exporting.md", "bash")
    before = os.getcwd()
    os.chdir(place)
    try:
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            assert words[:3] == ["python", "-m", "lib.export"]
            assert main(words[3:]) == 0
    finally:
        os.chdir(before)
    return place / "outputs" / "mrpc"


def logits_of(folder, first, second):
    """What the model in a folder answers, one row at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [
            model(**tokenizer(*pair, return_tensors="pt")).logits
            for pair in zip(first, second, strict=True)
        ]
    return torch.cat(rows).numpy()


def comparison(folder):
    return json.loads((folder / "comparison.json").read_text())


@installed
def test_onnx_runtime_answers_as_the_model_for_any_number_and_length_of_rows(exported):
    import onnxruntime

    found = comparison(exported / "onnx")
    assert found["largest_difference"] < 1e-5
    assert found["rows"] == "pairs.csv"  # the last command
    assert found["num_rows"] == found["same_decisions"] == 9

    # The export stands alone: its tokenizer and graph, without this project.
    tokenizer = AutoTokenizer.from_pretrained(exported / "onnx")
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    for count in (1, 2, 3):
        first, second = zip(*ROWS[:count], strict=True)
        batch = tokenizer(list(first), list(second), padding=True, return_tensors="np")
        (logits,) = session.run(["logits"], dict(batch))
        np.testing.assert_allclose(logits, logits_of(exported, first, second), atol=1e-5)


@installed
def test_openvino_answers_as_the_model(exported):
    import openvino

    found = comparison(exported / "openvino")
    assert found["largest_difference"] < 1e-5
    assert found["num_rows"] == found["same_decisions"] == 23  # the validation rows
    compiled = openvino.Core().compile_model(
        exported / "openvino" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    first, second = zip(*ROWS, strict=True)
    tokenizer = AutoTokenizer.from_pretrained(exported / "openvino")
    batch = tokenizer(list(first), list(second), padding=True, return_tensors="np")
    logits = compiled(dict(batch))["logits"]
    np.testing.assert_allclose(logits, logits_of(exported, first, second), atol=1e-5)


@installed
def test_differences_of_int8_are_counted(exported, files):
    import datasets
    import onnxruntime

    rows = datasets.load_dataset("csv", data_files=str(files["validation"]))["train"]
    first, second = list(rows["sentence1"]), list(rows["sentence2"])
    tokenizer = AutoTokenizer.from_pretrained(exported)
    batch = tokenizer(first, second, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(exported / "onnx-int8" / "model.onnx")
    (logits,) = session.run(["logits"], dict(batch))
    expected = logits_of(exported, first, second)
    found = comparison(exported / "onnx-int8")
    assert found["largest_difference"] == pytest.approx(abs(logits - expected).max(), abs=1e-5)
    assert found["largest_difference"] > 1e-4
    assert found["same_decisions"] == (logits.argmax(1) == expected.argmax(1)).sum()
    weights = [exported / name / "model.onnx.data" for name in ("onnx", "onnx-int8")]
    assert weights[1].stat().st_size < 0.5 * weights[0].stat().st_size


@installed
def test_the_page_shows_three_runtimes_that_agree(exported, monkeypatch):
    monkeypatch.chdir(exported.parent.parent)
    found = run_python("exporting.md")
    label = found["config"].id2label[found["logits"].argmax()]
    assert label == found["classifier"](found["pair"])["label"]
    compiled = found["compiled"](dict(found["batch"]))["logits"]
    assert compiled == pytest.approx(found["logits"], abs=1e-5)


@installed
def test_older_transformers_export_a_regression_of_one_text_through_torch(
    flags, tmp_path, capsys, monkeypatch
):
    rows = [{"sentence": f"number {n}", "label": n / 4} for n in range(1, 20, 2)]
    path = write_csv(tmp_path / "rows.csv", rows)
    own = [f"--train_file={path}", f"--validation_file={path}"]
    folder = tmp_path / "out"
    run(flags, folder, *own, "--max_train_steps=1")
    monkeypatch.setattr("lib.export._exporters", lambda: None)
    capsys.readouterr()
    assert main([str(folder)]) == 0
    assert comparison(folder / "onnx")["largest_difference"] < 1e-5
    # A score decides nothing.
    assert comparison(folder / "onnx")["same_decisions"] is None
    assert "same decision" not in capsys.readouterr().out
    assert "--int8 needs transformers 5.23" in error_line(capsys, folder, "--int8")


def error_line(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@installed
def test_what_cannot_be_exported_is_said_in_one_line(once, tmp_path, capsys):
    assert "no such folder" in error_line(capsys, tmp_path / "nowhere")
    assert "no such file" in error_line(capsys, once, f"--file={tmp_path / 'none.csv'}")
    path = write_csv(tmp_path / "other.csv", [{"text": "a", "label": 1}])
    assert "no column sentence1" in error_line(capsys, once, f"--file={path}")
    assert "with --format onnx" in error_line(capsys, once, "--format=openvino", "--int8")
    other = shutil.copytree(once, tmp_path / "run")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("validation.csv", "moved.csv"))
    assert "moved.csv): compare on other rows with --file" in error_line(capsys, other)
    (other / "onnx").mkdir()
    (other / "onnx" / "model.onnx").write_text("mine")
    assert "onnx is in the way, and not an export: move it elsewhere" in error_line(capsys, other)
    assert (other / "onnx" / "model.onnx").read_text() == "mine"


def test_missing_packages_are_named_before_anything_is_read(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lib.export.find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    said = error_line(capsys, tmp_path / "nowhere")
    assert "--format onnx needs onnx, onnxscript, onnxruntime: pip install onnx" in said
