import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compared_runs import LABELS, make_run, wrong_in
from conftest import ROOT

from lib.cli.parsing import parse_arguments
from lib.compare.__main__ import main
from lib.compare.significance import (
    standard_error_of_share,
)
from lib.data.tasks import TASKS
from lib.training import metrics
from train_mrpc import main as train


@pytest.fixture
def three(tmp_path):
    """Three runs with accuracies of 0.9, 0.8 and 0.7."""
    wrong = ([0], [0, 3], [0, 3, 5])
    return [
        make_run(tmp_path / f"run.s{seed}", wrong_in(*rows), seed=seed)
        for seed, rows in enumerate(wrong)
    ]


def compared(capsys, *arguments):
    """The comparison as `--format json` prints it."""
    assert main([*map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def error_line(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_table_over_seeds_by_hand(three, capsys):
    content = compared(capsys, *three)["sets"]["A"]
    accuracy = content["figures"]["eval_accuracy"]
    assert accuracy["num_runs"] == 3
    assert accuracy["mean"] == pytest.approx(0.8)
    assert accuracy["standard_deviation"] == pytest.approx(0.1)
    # Student's t for two degrees of freedom, from a printed table: 4.303.
    half = 4.303 * 0.1 / 3**0.5
    assert accuracy["interval"] == pytest.approx([0.8 - half, 1], abs=1e-4)  # 0.8 + half > 1
    assert accuracy["best"] == {"value": 0.9, "run": three[0]}
    assert accuracy["worst"] == {"value": 0.7, "run": three[2]}
    assert content["num_rows"] == 10
    assert "eval_num_rows" not in content["figures"]


def test_best_loss_is_the_lowest_and_best_speed_the_highest(three, capsys):
    figures = compared(capsys, *three)["sets"]["A"]["figures"]
    assert figures["eval_loss"]["best"]["run"] == three[0]
    assert figures["train_examples_per_second"]["best"]["value"] == 12
    assert figures["train_examples_per_second"]["mean"] == pytest.approx(11)


def test_a_single_run_has_no_interval(three, capsys):
    content = compared(capsys, three[0])
    assert content["sets"]["A"]["figures"]["eval_accuracy"]["interval"] is None
    assert "A is a single run: one seed has no interval." in content["sentences"]


def test_standard_error_of_the_rows_is_printed(three, capsys):
    # 80% of 10 rows: sqrt(0.8 * 0.2 / 10) = 0.126
    assert main(three) == 0
    printed = capsys.readouterr().out
    assert (
        "With 10 validation rows the accuracy of each model has a standard error of 12.6 points"
        in printed
    )
    assert standard_error_of_share(0.87, 408) == pytest.approx(0.0166, abs=1e-4)


def test_names_a_collapsed_run(three, tmp_path, capsys):
    collapsed = make_run(tmp_path / "run.s3", np.ones(10, int), seed=3)
    content = compared(capsys, *three, collapsed)
    assert content["sets"]["A"]["collapsed"] == {collapsed: "equivalent"}
    assert content["sentences"][0].startswith(f"{collapsed} (A) collapsed")


def test_set_that_mixes_recipes_is_reported(three, tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"rate.s{seed}", wrong_in(seed), seed=seed, learning_rate=rate)
        for seed, rate in enumerate((1e-4, 2e-4))
    ]
    assert (
        "not of one recipe (they differ in learning_rate)"
        in compared(capsys, *runs)["sentences"][0]
    )
    assert compared(capsys, *three)["sets"]["A"]["recipes_differ_in"] == []


# ---------------------------------------------------------------------------- two sets


def runs_of(folder, share, *, labels, seeds, generator, **config):
    """Runs that are each wrong in `share` of the rows, drawn for each run."""
    runs = []
    for seed in seeds:
        wrong = generator.permutation(len(labels))[: round(share * len(labels))]
        predictions = wrong_in(*wrong, labels=labels)
        runs.append(make_run(folder / f"s{seed}", predictions, labels=labels, seed=seed, **config))
    return runs


@pytest.fixture
def sets(tmp_path):
    """Two recipes: one with 85, 87 and 86 of 100 rows right, the other with 60, 62 and 61."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=100)
    made = []
    for name, shares, rate in (("good", (0.15, 0.13, 0.14), 1e-4), ("bad", (0.4, 0.38, 0.39), 0.1)):
        made.append(
            [
                runs_of(
                    tmp_path / name,
                    share,
                    labels=labels,
                    seeds=[seed],
                    generator=generator,
                    learning_rate=rate,
                )[0]
                for seed, share in enumerate(shares)
            ]
        )
    return made


def test_difference_far_beyond_the_noise_is_significant(sets, capsys):
    good, bad = sets
    content = compared(capsys, *good, "--against", *bad)
    accuracy = content["differences"]["B"]["metrics"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(0.25)
    assert accuracy["interval"][0] > 0
    assert accuracy["distinguishable"] is True
    assert content["deciding_metric"] == "combined_score"
    said = " ".join(content["sentences"])
    assert "A is higher by more than noise" in said
    assert "differ in: learning_rate 0.0001 and 0.1" in said
    assert "B is higher by more" in " ".join(
        compared(capsys, *bad, "--against", *good)["sentences"]
    )


def test_names_no_winner_within_the_noise(three, tmp_path, capsys):
    others = [
        make_run(tmp_path / f"other.s{seed}", wrong_in(*rows), seed=seed)
        for seed, rows in enumerate(([1], [1, 4], [4, 8]))
    ]
    content = compared(capsys, *three, "--against", *others)
    said = " ".join(content["sentences"])
    assert content["differences"]["B"]["metrics"]["combined_score"]["distinguishable"] is False
    assert "not distinguishable from noise" in said
    assert "higher" not in said
    assert "standard error of 12.6 points" in said


def test_intervals_of_scores_stay_in_their_range(three, tmp_path, capsys):
    # 0.9, 0.8 and 0.7 of ten rows: t gives 0.55 to 1.05, and the losses of 0.1 to 0.3 go below 0.
    figures = compared(capsys, *three)["sets"]["A"]["figures"]
    assert figures["eval_accuracy"]["interval"] == pytest.approx([0.5516, 1], abs=1e-4)
    assert figures["eval_loss"]["interval"] == pytest.approx([-0.0484, 0.4484], abs=1e-4)
    assert figures["train_examples_per_second"]["interval"][1] > 1
    for score in ("f1", "combined_score"):
        assert figures[f"eval_{score}"]["interval"][1] <= 1
    # Two models that are right in no row or in all but one: 0.9, of at most 1.
    wrong = make_run(tmp_path / "wrong", 1 - LABELS, learning_rate=1.0)
    metrics = compared(capsys, three[0], "--against", wrong)["differences"]["B"]["metrics"]
    assert metrics["accuracy"]["difference"] == pytest.approx(0.9)
    assert metrics["accuracy"]["interval"][1] == 1


def test_correlations_may_be_negative(tmp_path, capsys):
    labels = np.arange(10.0)
    runs = []
    for seed, name in enumerate(("up", "down", "up again")):
        noise = np.random.default_rng(seed).random(10)
        predictions = noise + (-labels if name == "down" else labels)
        runs.append(
            make_run(
                tmp_path / name, predictions, labels=labels, seed=seed, task_name="stsb", rate=seed
            )
        )
    content = compared(capsys, *runs)
    assert content["sets"]["A"]["figures"]["eval_pearson"]["interval"] == [-1, 1]
    difference = compared(capsys, runs[0], "--against", runs[1])["differences"]["B"]
    assert difference["metrics"]["pearson"]["interval"][1] > 1.9


def test_f1_is_printed_with_its_class(sets, capsys):
    good, bad = sets
    for output in ("text", "markdown", "html"):
        assert main([*good, "--against", *bad, "--format", output]) == 0
        printed = capsys.readouterr().out.replace("&#39;", "'")
        assert printed.count("eval_f1 of 'equivalent'") == 2
        assert printed.count("f1 of 'equivalent'") == 3
    difference = compared(capsys, *good, "--against", *bad)["differences"]["B"]
    assert difference["metrics"]["f1"]["title"] == "f1 of 'equivalent'"


def test_several_sets_are_corrected_for_their_number(sets, tmp_path, capsys):
    good, bad = sets
    labels = np.random.default_rng(0).integers(2, size=100)
    generator = np.random.default_rng(3)
    alike = [
        runs_of(
            tmp_path / "alike",
            share,
            labels=labels,
            seeds=[seed],
            generator=generator,
            learning_rate=2e-4,
        )[0]
        for seed, share in enumerate((0.14, 0.15, 0.13))
    ]
    content = compared(capsys, *good, "--against", *bad, "--against", *alike)
    far, near = content["differences"]["B"], content["differences"]["C"]
    metric = content["deciding_metric"]
    p_values = [each["metrics"][metric]["p_value"] for each in (far, near)]
    assert far["adjusted_p_value"] == pytest.approx(2 * p_values[0])
    assert near["adjusted_p_value"] == pytest.approx(p_values[1])
    said = " ".join(content["sentences"])
    assert "A is higher by more than noise" in said
    assert "corrected for 2 comparisons (Holm)" in said
    assert "The first runs of A and C differ in: learning_rate 0.0001 and 0.0002" in said
    assert main([*good, "--against", *bad, "--against", *alike]) == 0
    assert "A - C (alike)" in capsys.readouterr().out


def test_runs_with_the_same_seeds_are_paired(sets, tmp_path, capsys):
    good, bad = sets
    both = compared(capsys, *good, "--against", *bad[::-1])["differences"]["B"]
    assert both == compared(capsys, *good, "--against", *bad)["differences"]["B"]
    others = [tmp_path / f"other.s{seed}" for seed in range(3, 6)]
    for one, other in zip(bad, others, strict=True):  # the same runs, with other seeds
        shutil.copytree(one, other)
        config = (other / "config.yaml").read_text()
        seed = other.name[-1]
        (other / "config.yaml").write_text(
            config.replace(f"seed: {int(seed) - 3}", f"seed: {seed}")
        )
    unpaired = compared(capsys, *good, "--against", *others)["differences"]["B"]
    assert (both["num_pairs"], unpaired["num_pairs"]) == (3, 0)
    # The runs of A whose seeds B has not are left out; with fewer than three pairs, none is.
    more = compared(capsys, *good, *others, "--against", *bad)
    assert more["differences"]["B"] == both
    assert "A - B is of the 3 seeds that both sets have, in pairs." in more["sentences"]
    fewer = compared(capsys, *good, *others, "--against", *bad[1:])["differences"]["B"]
    assert fewer["num_pairs"] == 0
    degrees = [each["metrics"]["accuracy"]["degrees_of_freedom"] for each in (both, unpaired)]
    assert degrees[0] < degrees[1]


def test_plot_shows_every_run(sets, tmp_path, capsys):
    good, bad = sets
    plot = tmp_path / "comparison.svg"
    assert main([*good, "--against", *bad, "--plot", str(plot)]) == 0
    picture = plot.read_text()
    assert "95%" in capsys.readouterr().out
    # The runs' dots and the means are drawn as copies of two markers.
    assert picture.count("<use ") >= 2 * 3 + 2
    again = error_line(capsys, *good, "--plot", str(plot))
    assert f"{plot} exists already" in again
    assert picture == plot.read_text()
    assert ".png, .svg, .pdf" in error_line(capsys, *good, "--plot", str(tmp_path / "plot.gif"))
    assert "there is no folder" in error_line(capsys, *good, "--plot", str(plot / "no" / "a.png"))


@pytest.mark.parametrize("num_runs", [1, 2])
def test_too_few_runs_give_no_verdict(sets, capsys, num_runs):
    good, bad = sets
    content = compared(capsys, *good[:num_runs], "--against", *bad)
    assert content["differences"]["B"]["metrics"]["accuracy"]["distinguishable"] is None
    assert f"it takes at least 3 of each, here are {num_runs} and 3" in " ".join(
        content["sentences"]
    )


def test_output_is_deterministic(sets, capsys):
    good, bad = sets
    assert compared(capsys, *good, "--against", *bad) == compared(capsys, *good, "--against", *bad)


@pytest.mark.parametrize("task", ["cola", "mnli", "stsb", "sst2"])
def test_other_tasks_are_scored_by_their_own_metrics(task, tmp_path, capsys):
    generator = np.random.default_rng(0)
    classes = len(TASKS[task].labels)
    labels = generator.integers(classes, size=60) if classes else generator.random(60) * 5
    runs = []
    for seed in range(6):
        if classes:
            predictions = np.where(
                generator.random(60) < 0.7, labels, generator.integers(classes, size=60)
            )
        else:
            predictions = labels + generator.normal(size=60)
        runs.append(
            make_run(tmp_path / f"s{seed}", predictions, labels=labels, seed=seed, task_name=task)
        )
    content = compared(capsys, *runs[:3], "--against", *runs[3:])
    figures = [content["sets"][name]["figures"] for name in "AB"]
    names = metrics.metric_names(TASKS[task].metrics)[:-1]
    assert list(content["differences"]["B"]["metrics"]) == names
    for name in names:
        a, b = (one[f"eval_{name}"]["mean"] for one in figures)
        assert content["differences"]["B"]["metrics"][name]["difference"] == pytest.approx(a - b)


def test_real_runs_are_read(flags, tmp_path, capsys):
    for seed in (1, 2):
        train(parse_arguments([*flags, f"--seed={seed}", f"--output_dir={tmp_path / str(seed)}"]))
    capsys.readouterr()
    content = compared(capsys, tmp_path / "1", "--against", tmp_path / "2")
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in "12"]
    found = content["sets"]["A"]["figures"]
    assert found["eval_loss"]["mean"] == pytest.approx(results[0]["eval_loss"])
    assert found["train_examples_per_second"]["mean"] > 0
    assert content["differences"]["B"]["metrics"]["f1"]["difference"] == pytest.approx(
        results[0]["eval_f1"] - results[1]["eval_f1"]
    )
    assert "The first runs of A and B differ in no flag but the seed." in " ".join(
        content["sentences"]
    )


# ---------------------------------------------------------------------------- refusals


def test_rejects_runs_on_other_data(three, tmp_path, capsys):
    other = make_run(tmp_path / "other", wrong_in(7), fingerprint="e" * 64)
    said = error_line(capsys, *three, "--against", other)
    assert other in said
    assert "data_fingerprint eeeeeeee and ffffffff" in said


def test_rejects_the_same_seed_twice(three, tmp_path, capsys):
    """On another machine the last digits differ, but the seed is the same draw."""
    again = make_run(tmp_path / "again", wrong_in(7), seed=2)
    assert f"{again} has the recipe and the seed of {three[2]}" in error_line(capsys, *three, again)


def test_precision_is_part_of_the_recipe(three, tmp_path, capsys):
    other = make_run(tmp_path / "other", wrong_in(7), seed=1)
    for run, precision in ((three[0], "no"), (other, "bf16")):
        path = Path(run) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "precision": precision}))
    words = compared(capsys, three[0], "--against", other)["sentences"]
    assert "The first runs of A and B differ in: precision no and bf16." in words


def test_number_of_test_rows_does_not_matter(three, tmp_path, capsys):
    other = make_run(tmp_path / "other", wrong_in(7), seed=3, max_predict_samples=8)
    content = compared(capsys, *three, other)
    assert content["sets"]["A"]["recipes_differ_in"] == []


def test_rejects_other_rows_labels_or_tasks(three, tmp_path, capsys):
    short = make_run(tmp_path / "short", LABELS[:8], labels=LABELS[:8])
    assert "8 and 10 validation rows" in error_line(capsys, three[0], short)
    labels = wrong_in(4)
    relabeled = make_run(tmp_path / "relabeled", labels, labels=labels)
    assert "row 4 has another label" in error_line(capsys, three[0], relabeled)
    rte = make_run(tmp_path / "rte", LABELS, task_name="rte")
    assert "tasks mrpc and rte" in error_line(capsys, three[0], "--against", rte)


def test_rejects_unfinished_runs(three, tmp_path, capsys):
    status = tmp_path / "run.s0" / "status.json"
    status.write_text('{"status": "preempted", "update": 3}')
    assert "not finished (its status is 'preempted')" in error_line(capsys, *three)
    status.write_text('{"status": "finished", "update": 3}')
    assert main(three) == 0
    capsys.readouterr()
    (tmp_path / "run.s1" / "manifest.json").unlink()
    assert "run.s1: the run is not finished (it has no manifest.json)" in error_line(capsys, *three)


def test_rejects_folders_without_a_readable_run(three, tmp_path, capsys):
    assert "no such folder" in error_line(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.yaml" in error_line(capsys, tmp_path / "empty")
    predictions = tmp_path / "run.s0" / "predictions" / "validation.jsonl"
    predictions.write_text('{"index": 0, "prediction": "equivalent"}\n')
    assert "validation.jsonl does not have" in error_line(capsys, *three)
    predictions.write_text("")
    assert "validation.jsonl does not have" in error_line(capsys, *three)
    predictions.unlink()
    assert "validation.jsonl cannot be read" in error_line(capsys, *three)
    (tmp_path / "run.s1" / "all_results.json").write_text("{")
    assert "all_results.json cannot be read" in error_line(capsys, *three[1:])


def test_rejects_the_same_run_twice(three, tmp_path, capsys):
    assert "given twice" in error_line(capsys, *three, "--against", three[1])
    copy = make_run(tmp_path / "copy", wrong_in(0), seed=0)
    assert "a copy of the same run" in error_line(capsys, three[0], copy)


# ---------------------------------------------------------------------------- formats


def test_text_aligns_its_columns(three, capsys):
    assert main(three) == 0
    header, first = capsys.readouterr().out.splitlines()[1:3]
    assert first.startswith("eval_accuracy ")
    assert first.index("0.8000") == header.index("mean")
    assert first.index("0.5516 to 1.0000") == header.index("95% interval")


def test_markdown_has_a_table_and_escapes_names(tmp_path, capsys):
    assert main([make_run(tmp_path / "a|<b>", wrong_in(0)), "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert "| eval_accuracy | 1 | 0.9000 |" in printed
    assert "<b>" not in printed


def test_html_escapes_names_and_needs_no_other_file(sets, tmp_path, capsys):
    good, bad = sets
    evil = tmp_path / "<script>alert('x')"
    (tmp_path / "good" / "s0").rename(evil)
    assert main([str(evil), *good[1:], "--against", *bad, "--format", "html"]) == 0
    printed = capsys.readouterr().out

    tags, texts = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(printed)
    assert "script" not in tags
    assert tags.count("table") == 3
    assert any("<script>alert('x')" in text for text in texts)
    assert any("A is higher by more than noise" in text for text in texts)


def test_it_runs_as_a_module_from_any_folder(three, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lib.compare", *(Path(run).name for run in three)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A: run.s0, run.s1, run.s2")


def test_nothing_heavy_is_imported(sets):
    good, bad = sets
    code = (
        "import sys; from lib.compare.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy.stats'};"
        "assert not heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *good, "--against", *bad],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
