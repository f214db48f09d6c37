"""`python -m lib.predict`: the figures of the run, however it is started, killed and resumed."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet
import pytest
from conftest import ROOT, kill_all, pairs, torchrun, wait_for, write_csv
from runs import run
from sklearn.metrics import accuracy_score, f1_score

from lib.cli.parsing import parse_arguments
from lib.errors import InputError
from lib.predict import windows
from lib.predict.__main__ import main


def predict(*arguments):
    """Run the command in this process; return its exit status."""
    return main([str(argument) for argument in arguments])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def refusal(capsys, *arguments):
    """The only line of a command that ends with status 2."""
    capsys.readouterr()
    assert predict(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def glue(flags, files, tmp_path_factory):
    """A run of a GLUE task, which leaves a submission file."""
    folder = tmp_path_factory.mktemp("glue")
    run(flags, folder, "--task_name=mrpc", f"--test_file={files['test']}")
    return folder


@pytest.fixture
def small_windows(monkeypatch):
    """Five windows for the rows of the validation file."""
    monkeypatch.setattr(windows, "ROWS_PER_WINDOW", 5)


def test_predicts_what_the_run_predicted_bit_for_bit(once, files, tmp_path):
    output = tmp_path / "predictions.jsonl"
    assert predict(once, files["validation"], "--output", output) == 0
    lines = read_lines(output)
    expected = read_lines(once / "predictions" / "validation.jsonl")
    assert [line["probabilities"] for line in lines] == [row["probabilities"] for row in expected]
    assert [line["prediction"] for line in lines] == [row["prediction"] for row in expected]
    rows = read_csv(files["validation"])
    assert [list(line)[:3] for line in lines] == [list(row) for row in rows]
    assert [{name: line[name] for name in rows[0]} for line in lines] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_agrees_with_the_pipeline_of_transformers(once, capsys):
    from transformers import pipeline

    text, pair = "He left on Monday.", "On Monday he left."
    assert predict(once, "--text", text, "--text_pair", pair) == 0
    found = json.loads(capsys.readouterr().out)
    scores = pipeline("text-classification", str(once), top_k=None)(
        {"text": text, "text_pair": pair}
    )
    expected = {score["label"]: score["score"] for score in scores}
    assert found["probabilities"] == pytest.approx(expected, abs=1e-6)
    assert found["prediction"] == scores[0]["label"]
    assert (found["sentence1"], found["sentence2"]) == (text, pair)


def test_scores_rows_with_labels_and_writes_the_file_of_glue(glue, files, tmp_path, capsys):
    submission = tmp_path / "MRPC.tsv"
    output = tmp_path / "out.jsonl"
    assert predict(glue, files["test"], "--output", output, "--submission", submission) == 0
    assert submission.read_bytes() == (glue / "predictions" / "MRPC.tsv").read_bytes()
    printed = capsys.readouterr().out
    lines = read_lines(output)
    labels = [int(line["label"]) for line in lines]
    answers = [line["prediction"] == "equivalent" for line in lines]
    shown = dict(re.findall(r"^(\w+).*?([\d.]+)  \(", printed, re.MULTILINE))
    assert float(shown["accuracy"]) == pytest.approx(accuracy_score(labels, answers), abs=5e-5)
    assert float(shown["f1"]) == pytest.approx(f1_score(labels, answers), abs=5e-5)


def test_several_files_become_one_output_of_any_format(once, files, tmp_path, small_windows):
    tables = {}
    for ending in ("jsonl", "csv", "parquet"):
        output = tmp_path / f"out.{ending}"
        assert predict(once, files["validation"], files["test"], "--output", output) == 0
        tables[ending] = output
    lines = read_lines(tables["jsonl"])
    rows = [row for name in ("validation", "test") for row in read_csv(files[name])]
    assert [line["sentence1"] for line in lines] == [row["sentence1"] for row in rows]
    found = read_csv(tables["csv"])
    assert [row["sentence2"] for row in found] == [row["sentence2"] for row in rows]
    columns = pyarrow.parquet.read_table(tables["parquet"]).to_pylist()
    for line, row, column in zip(lines, found, columns, strict=True):
        assert line["prediction"] == row["prediction"] == column["prediction"]
        for name, value in line["probabilities"].items():
            assert value == float(row[f"probability_{name}"]) == column[f"probability_{name}"]


def test_no_cell_of_a_csv_file_is_a_formula(once, tmp_path):
    texts = ["=cmd|' /C calc'!A0", "@SUM(1)", "-2+3", "\tone", "\rone", "＝1", "plain", "it's"]  # noqa: RUF001
    ids = ["-5", "+1.5e3", "-", "-1_0", ".5", "7", "=1", "0"]
    rows = [
        {"=id": number, "sentence1": text, "sentence2": "two"}
        for number, text in zip(ids, texts, strict=True)
    ]
    source = write_csv(tmp_path / "rows.csv", rows)
    assert predict(once, source, "--output", tmp_path / "out.csv") == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert found[0][:3] == ["'=id", "sentence1", "sentence2"]
    assert [row[1] for row in found[1:]] == [
        *(f"'{text}" for text in texts[:6]), "plain", "it's",
    ]  # fmt: skip
    assert [row[0] for row in found[1:]] == ["-5", "+1.5e3", "'-", "'-1_0", ".5", "7", "'=1", "0"]
    assert predict(once, source, "--output", tmp_path / "out.jsonl") == 0
    assert [line["sentence1"] for line in read_lines(tmp_path / "out.jsonl")] == texts


def test_an_interrupted_prediction_resumes(once, files, tmp_path, small_windows, capsys):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert predict(once, files["validation"], "--output", whole) == 0
    written = []

    def interrupt(path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return replacing(path)

    replacing = windows.replacing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "replacing", interrupt)
        assert predict(once, files["validation"], "--output", output) == 130
    assert not output.exists()
    again = ["--batch_size=3", "--output", output]
    assert "another batch_size: give what it was" in refusal(
        capsys, once, files["validation"], *again
    )
    assert predict(once, files["validation"], "--output", output) == 0
    assert "resuming: 2 of 5 windows are predicted" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


@pytest.mark.processes
def test_two_killed_processes_leave_windows_that_one_completes(once, tmp_path, capsys):
    source = write_csv(tmp_path / "rows.csv", pairs(500, 7) * 18)  # 9,000 rows: 3 windows
    output, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    command = [*torchrun(2), "-m", "lib.predict", str(once), str(source), f"--output={output}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    unfinished = tmp_path / ".out.csv.unfinished"
    try:
        wait_for(lambda: len(list(unfinished.glob("0*.npy"))) >= 1 or process.poll() is not None)
    finally:
        kill_all(process, 2)
    assert not output.exists()
    assert predict(once, source, "--output", output) == 0
    assert re.search(r"resuming: [1-3] of 3 windows", capsys.readouterr().out)
    done = subprocess.run(
        [*command[:-1], f"--output={whole}"],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert whole.read_bytes() == output.read_bytes()


MEMORY = """
import sys
from pathlib import Path
import numpy as np, pyarrow, pyarrow.parquet
from accelerate import Accelerator
from lib.predict.inputs import read_rows
from lib.predict.outputs import with_predictions, write_tables
from lib.predict.windows import Windows

folder, columns = Path(sys.argv[1]), pyarrow.schema([("a", pyarrow.string())])
for size in (70_000, 560_000):
    source = folder / f"{size}.parquet"
    with pyarrow.parquet.ParquetWriter(source, columns) as new:
        for start in range(0, size, 10_000):
            texts = [f"{row:0200}" for row in range(start, start + 10_000)]
            new.write_table(pyarrow.table({"a": texts}))
    rows = read_rows([source], text_columns=("a",), label_column="label", label_names=("n", "y"),
                     by_number=False, new_columns=set())
    windows = Windows(folder / f"{size}", size)
    missing = windows.claim({}, overwrite=False)
    windows.predict(missing, rows.texts, lambda texts: np.zeros((len(texts["a"]), 2), np.float32),
                    Accelerator())
    write_tables(folder / f"{size}.jsonl", (
        with_predictions(rows.window(start, len(logits)), logits.argmax(1), logits, ("n", "y"))
        for start, logits in windows))
    pyarrow.default_memory_pool().release_unused()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["RssAnon"].split()[0]) / 1024)
"""


@pytest.mark.processes
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """560,000 rows are 112 MB of text, which stay on the disk; files are read in 65,536 rows."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    few, many = map(float, done.stdout.splitlines()[-2:])
    assert many < few + 40, done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "nowhere"}, "nowhere: no such folder; give the --output_dir"),
        ({"folder": "empty"}, "empty is not the output folder of a run: it has no config.yaml"),
        ({"folder": "running"}, "running: its run is preempted, not finished"),
        ({"file": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"file": "empty.csv"}, "empty.csv is empty: it needs at least one row"),
        ({"file": "header.csv"}, "header.csv has no rows"),
        ({"file": "other.csv"}, "no column sentence2 .found: sentence1, text.; name yours with"),
        ({"file": "hole.csv"}, "hole.csv, row 2: sentence2 must be text, found nothing"),
        ({"file": "label.csv"}, "label.csv, row 1, column label: unknown label 'maybe'"),
        ({"file": "taken.csv"}, "taken.csv: the predictions need the name prediction; rename"),
        ({"more": ["other.csv"]}, "no column sentence2"),
        ({"more": ["--output=exists.csv"]}, "exists.csv exists: give another name, or --overwrite"),
        ({"more": ["--output=out.xlsx"]}, "out.xlsx: its extension does not name a format"),
        ({"more": ["--output=no/out.csv"]}, "no folder no; create it first"),
        ({"more": ["--submission=new.tsv"]}, "gluebenchmark.com takes none for the task"),
        ({"more": ["--text=one"]}, "give either files or --text"),
        ({"more": ["--batch_size=0"]}, "--batch_size must be at least 1, got 0"),
    ],
)
def test_refuses_in_one_line(once, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(once, tmp_path / "running")
    status = {**json.loads((once / "status.json").read_text()), "status": "preempted"}
    (tmp_path / "running" / "status.json").write_text(json.dumps(status))
    good = {"sentence1": "one", "sentence2": "two"}
    write_csv(tmp_path / "good.csv", [good])
    write_csv(tmp_path / "exists.csv", [good])
    write_csv(tmp_path / "hole.csv", [good, {**good, "sentence2": ""}])
    write_csv(tmp_path / "label.csv", [{**good, "label": "maybe"}])
    write_csv(tmp_path / "taken.csv", [{**good, "prediction": "x"}])
    write_csv(tmp_path / "other.csv", [{"sentence1": "one", "text": "two"}])
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("sentence1,sentence2\n")
    before = sorted(tmp_path.rglob("*"))
    folder = change.get("folder", once)
    line = refusal(capsys, folder, change.get("file", "good.csv"), *change.get("more", []))
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_training_script_leads_here(once, tmp_path):
    """From a test file without training rows, where the output folder holds a finished run."""
    flags = ["--test_file", "my pairs.csv", "--output_dir"]
    with pytest.raises(InputError) as refused:
        parse_arguments([*flags, str(once)])
    assert str(refused.value).endswith(f"run: python -m lib.predict {once} 'my pairs.csv'")
    with pytest.raises(InputError, match="give the training rows as a file too"):
        parse_arguments([*flags, str(tmp_path)])


def test_rows_of_one_text_take_one_text(once, capsys):
    assert "give --text and --text_pair" in refusal(capsys, once, "--text", "one")
    assert "--text_pair without --text" in refusal(capsys, once, "a.csv", "--text_pair", "one")


def test_code_that_came_with_a_model_is_not_executed(once, tmp_path, capsys):
    """Neither where config.json names it, nor where config.yaml says that the run trusted it."""
    folder = shutil.copytree(once, tmp_path / "run")
    trap = tmp_path / "executed"
    (folder / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_trap.Config",
        "AutoModelForSequenceClassification": "modeling_trap.Model",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "trap"}))
    text = ["--text=one", "--text_pair=two"]
    assert "cannot be loaded" in refusal(capsys, folder, *text)
    yaml = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        yaml.replace("trust_remote_code: false", "trust_remote_code: true")
    )
    assert "give --trust_remote_code to execute them" in refusal(capsys, folder, *text)
    assert not trap.exists()
