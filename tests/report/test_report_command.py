"""`python -m lib.report OUTPUT_DIR`: the report and the model card, from the folder alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from finished_run import write_finished_run

from lib.cli.parsing import parse_arguments
from lib.data.tasks import task_of_files
from lib.report.__main__ import main as report_main
from train_mrpc import main

LINES = [
    {"index": row, "prediction": "b", "label": label, "probabilities": {"a": 0.4, "b": 0.6}}
    for row, label in enumerate("ab")
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "run"
    return write_finished_run(folder, task_of_files(("one", "other"), ("a", "b")), LINES)


@pytest.fixture
def finished(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "run")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_remakes_the_report_of_a_run_from_anywhere(flags, files, tmp_path, monkeypatch):
    """The run used relative paths and its data are gone: the report is the same to the byte."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "validation"):
        shutil.copy(files[name], tmp_path)
    own = ["--train_file=train.csv", "--validation_file=validation.csv", "--output_dir=out"]
    main(parse_arguments([*flags, *own, "--max_train_steps=3"]))
    written = contents(tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "out")
    for path in (tmp_path / "elsewhere" / "out" / "report").iterdir():
        if path.name != "data.json":
            path.unlink()
    (tmp_path / "elsewhere" / "out" / "README.md").unlink()
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "lib.report", "out"],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out/report/index.html\n"
    assert contents(tmp_path / "elsewhere" / "out") == written


def test_keeps_only_the_texts_of_the_rows_shown(tmp_path):
    lines = [{**LINES[0], "index": row} for row in range(50)]  # every one is a mistake
    folder = write_finished_run(tmp_path / "run", task_of_files(("one",), ("a", "b")), lines)
    assert len(json.loads((folder / "report" / "data.json").read_text())["texts"]) == 20


def refusal(capsys, *folders):
    """Return the only line on stderr, of a call that wrote nothing."""
    before = {folder: contents(folder) for folder in folders if folder.is_dir()}
    assert report_main([str(folder) for folder in folders]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m lib.report: error: ")
    assert printed.err.count("\n") == 1
    assert {folder: contents(folder) for folder in before} == before
    return printed.err


def test_rejects_a_missing_folder(tmp_path, capsys):
    assert "nowhere: no such folder" in refusal(capsys, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "all_results.json",
        "manifest.json",
        "config.yaml",
        "metrics.jsonl",
        "report/data.json",
        "predictions/validation.jsonl",
    ],
)
def test_rejects_an_unfinished_or_damaged_folder(finished, capsys, name):
    path = finished / name
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"\xff\xfe", b"[]", b"{}", b"3", b""):
        path.write_bytes(damage)
        assert f"{path} is damaged" in refusal(capsys, finished), damage
    path.unlink()
    assert f"no {path}; run the command of this run again" in refusal(capsys, finished)


def test_one_bad_folder_rejects_all_before_writing(finished, tmp_path, capsys):
    (finished / "README.md").write_text("to be replaced")
    (tmp_path / "empty").mkdir()
    refusal(capsys, finished, tmp_path / "empty")
    assert (finished / "README.md").read_text() == "to be replaced"
