"""`python -m lib.compare --leaderboard`: a line for each run, the best first."""

import json
import subprocess
import sys

import numpy as np
import pytest
from compared_runs import LABELS, make_run, wrong_in
from conftest import ROOT

from lib.cli.parsing import parse_arguments
from lib.compare.__main__ import main
from train_mrpc import main as train


@pytest.fixture
def runs(tmp_path):
    """Three runs with accuracies of 0.8, 0.9 and 0.7, of two learning rates."""
    made = []
    for seed, (rows, rate) in enumerate((([0, 3], 1e-4), ([0], 1e-4), ([0, 3, 5], 2e-5))):
        folder = make_run(
            tmp_path / f"run{seed}",
            wrong_in(*rows),
            seed=seed,
            learning_rate=rate,
            model_name_or_path="google-bert/bert-base-uncased",
        )
        add_results(folder, eval_f1_ci95=[0.2, 1.0], eval_combined_score_ci95=[0.3, 0.95])
        made.append(folder)
    return made


def add_results(folder, **more):
    with open(f"{folder}/all_results.json", "r+") as file:
        results = json.load(file) | more
        file.seek(0)
        json.dump(results, file)


def ranked(capsys, *arguments):
    assert main(["--leaderboard", *map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_run_is_first(runs, capsys):
    (board,) = ranked(capsys, *runs)["boards"]
    assert (board["task"], board["num_rows"], board["metric"]) == ("mrpc", 10, "combined_score")
    assert [line["run"] for line in board["runs"]] == [runs[1], runs[0], runs[2]]
    best, _, last = board["runs"]
    # One of ten rows is wrong, of the six equivalent ones: f1 = 2 * 5 / (5 + 6).
    assert best["validation"]["accuracy"] == {"value": 0.9, "interval": [0.1, 0.9]}
    assert best["validation"]["f1"]["value"] == pytest.approx(10 / 11)
    assert best["validation"]["combined_score"]["value"] == pytest.approx((0.9 + 10 / 11) / 2)
    assert best["settings"] == {"learning_rate": 1e-4}
    assert last["settings"] == {"learning_rate": 2e-5}
    assert best["seed"] == 1
    assert best["train_examples_per_second"] == 11


def test_the_line_of_a_run_as_text_and_markdown(runs, capsys):
    add_results(runs[2], test_combined_score=0.5, test_combined_score_ci95=[0.25, 0.75])
    assert main(["--leaderboard", *runs]) == 0
    title, header, best, _, last = capsys.readouterr().out.splitlines()[:5]
    assert title == "mrpc, 10 validation rows"
    cells = ["run1", "bert-base-uncased", "1", "0.0001", "0.9045 (0.3000 to 0.9500)", "0.9000"]
    assert all(cell in best for cell in cells)
    assert "0.5000 (0.2500 to 0.7500)" in last
    start = header.index("test combined_score")
    assert last[start:].startswith("0.5000 (")
    assert best[start:].strip() == "11.0"
    assert main(["--leaderboard", *runs, "--format", "markdown"]) == 0
    assert "| bert-base-uncased | 1 | 0.0001 | 0.9045 (" in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_named(runs, tmp_path, capsys):
    status = tmp_path / "run0" / "status.json"
    status.write_text('{"status": "preempted", "update": 3}')
    content = ranked(capsys, *runs)
    assert [line["run"] for line in content["boards"][0]["runs"]] == [runs[1], runs[2]]
    assert f"{runs[0]} is not finished: preempted, at update 3." in content["sentences"]
    assert main(["--leaderboard", runs[0]]) == 2
    assert "none of the 1 runs is finished" in capsys.readouterr().err


def test_runs_on_other_rows_have_a_board_of_their_own(runs, tmp_path, capsys):
    """Other training rows are a difference like another flag; other validation rows are not."""
    fewer = make_run(tmp_path / "fewer", wrong_in(7), fingerprint="e" * 64, model_name_or_path="b")
    short = make_run(tmp_path / "short", LABELS[:8], labels=LABELS[:8], model_name_or_path="b")
    boards = ranked(capsys, *runs, fewer, short)["boards"]
    assert [board["num_rows"] for board in boards] == [10, 8]
    data = {line["run"]: line["settings"]["data"] for line in boards[0]["runs"]}
    assert data == {**dict.fromkeys(runs, "ffffffff"), fewer: "eeeeeeee"}


def test_a_collapsed_run_is_named(runs, tmp_path, capsys):
    run = make_run(tmp_path / "collapsed", np.ones(10, int), model_name_or_path="b")
    said = ranked(capsys, *runs, run)["sentences"]
    assert f"{run} collapsed: it predicts every row as 'equivalent'." in said


def test_real_runs_are_ranked(flags, files, tmp_path, capsys):
    for seed in (1, 2):
        more = [f"--seed={seed}", f"--test_file={files['test']}", "--save_only_model"]
        train(parse_arguments([*flags, *more, f"--output_dir={tmp_path / str(seed)}"]))
    results = {
        str(tmp_path / name): json.loads((tmp_path / name / "all_results.json").read_text())
        for name in "12"
    }
    capsys.readouterr()
    (board,) = ranked(capsys, *results)["boards"]
    scores = [results[line["run"]]["eval_combined_score"] for line in board["runs"]]
    assert scores == sorted(scores, reverse=True)
    for line in board["runs"]:
        found = results[line["run"]]
        assert line["test"]["f1"]["value"] == found["test_f1"]
        assert line["validation"]["f1"]["interval"] == found["eval_f1_ci95"]
        assert line["settings"] == {}
    for kind in ("text", "markdown", "html"):
        assert main(["--leaderboard", *results, "--format", kind]) == 0
        assert "test combined_score" in capsys.readouterr().out


def test_it_ranks_one_list_of_runs(runs, capsys):
    assert main(["--leaderboard", runs[0], "--against", runs[1]]) == 2
    assert "leave out --against" in capsys.readouterr().err


def test_it_runs_by_its_path_from_any_folder(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "lib" / "compare", "--leaderboard", "run0", "run1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("run1  bert-base-uncased")
