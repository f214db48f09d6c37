"""What the report says and shows, and that a browser opens it as it is."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn.metrics
from conftest import ROOT, write_csv
from huggingface_hub import ModelCard

from lib.cli.parsing import parse_arguments
from lib.data.tasks import TASKS, task_of_files
from lib.report import page as report_page
from lib.report import plots
from lib.training import metrics
from train_mrpc import main

PNG = b"\x89PNG\r\n\x1a\n"


def probabilities(*of_class_1):
    return np.array([[1 - value, value] for value in of_class_1])


# ------------------------------------------------------------------------------------ figures


def test_calibration_by_hand():
    """Confidences 0.6, 0.7 | 0.9, 0.95, 1.0 in bins of a fifth; 0.6 still belongs to the third."""
    predicted = probabilities(0.4, 0.7, 0.9, 0.05, 1.0)
    labels = np.array([0, 0, 1, 0, 0])
    confidence, accuracy, counts = metrics.calibration_bins(predicted, labels, num_bins=5)
    assert counts.tolist() == [0, 0, 1, 1, 3]
    assert confidence[2:] == pytest.approx([0.6, 0.7, 0.95])
    assert accuracy[2:] == pytest.approx([1, 0, 2 / 3])
    assert np.isnan(confidence[:2]).all()
    # (1 x 0.4 + 1 x 0.7 + 3 x (0.95 - 2/3)) / 5
    error = metrics.expected_calibration_error(confidence, accuracy, counts)
    assert error == pytest.approx((0.4 + 0.7 + 0.85) / 5)


def test_calibration_of_three_classes_takes_the_predicted_one():
    predicted = np.array([[0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])
    confidence, accuracy, counts = metrics.calibration_bins(predicted, np.array([2, 1]), num_bins=2)
    assert counts.tolist() == [2, 0]
    assert (confidence[0], accuracy[0]) == (pytest.approx(0.45), 0.5)


def test_the_precision_recall_curve_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=60)
    predicted = probabilities(*np.clip(0.3 * labels + generator.random(60) * 0.7, 0, 1))
    figure, averages = plots.precision_recall(predicted, labels, ("no", "yes"))
    curve, dot = figure.axes[0].lines[:2]
    precision, recall, _ = sklearn.metrics.precision_recall_curve(labels, predicted[:, 1])
    assert np.array_equal(curve.get_ydata(), precision)
    assert np.array_equal(curve.get_xdata(), recall)
    answers = predicted.argmax(axis=1)
    assert dot.get_xdata()[0] == pytest.approx(sklearn.metrics.recall_score(labels, answers))
    assert dot.get_ydata()[0] == pytest.approx(sklearn.metrics.precision_score(labels, answers))
    assert averages == {
        "yes": pytest.approx(sklearn.metrics.average_precision_score(labels, predicted[:, 1]))
    }


def test_precision_recall_of_three_classes_leaves_out_one_that_no_row_has():
    predicted = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4]])
    _, averages = plots.precision_recall(predicted, np.array([0, 1, 1]), ("a", "b", "c"))
    assert list(averages) == ["a", "b"]
    assert plots.precision_recall(predicted, np.array([1, 1, 1]), ("a", "b", "c")) is None


def test_the_confusion_matrix_counts_labels_down_and_predictions_across():
    answers, labels = np.array([0, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 1])
    figure = plots.confusion_matrix(answers, labels, ("no", "yes"))
    texts = [text.get_text().split() for text in figure.axes[0].texts]
    assert texts == [["1", "25%"], ["3", "75%"], ["0", "0%"], ["1", "100%"]]
    assert [axis.get_label_text() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)] == [
        "prediction",
        "label",
    ]


def test_a_name_with_dollars_is_not_a_formula():
    one = np.array([0])
    report_page._png(plots.confusion_matrix(one, one, ("$_$", "b")))


def test_the_learning_curve_marks_the_best_evaluation_and_its_interval():
    figure = plots.learning_curve(
        [1, 2, 3, 4],
        [0.9, 0.8, 0.7, 0.6],
        [2, 4],
        [0.85, 0.95],
        {"accuracy": [0.7, 0.6]},
        best_update=2,
        final={"accuracy": (0.7, 0.5, 0.8)},
    )
    losses, metric, saved = figure.axes
    assert losses.lines[0].get_ydata().tolist() == [0.9, 0.8, 0.7, 0.6]
    assert losses.lines[1].get_xdata().tolist() == [2, 4]
    assert all(axes.lines[-1].get_xdata() == [2, 2] for axes in (losses, metric))
    assert [list(line.get_ydata()) for line in saved.lines] == [[0.5, 0.8], [0.7]]


def test_the_same_figure_is_the_same_file():
    one, same = (report_page._png(plots.learning_rate([1, 2], [0.1, 0.2])) for _ in range(2))
    assert one == same
    assert one.startswith(PNG)
    assert b"Software" not in one


# ------------------------------------------------------------------------------------ mistakes


def test_the_most_confident_mistakes_come_first():
    predicted = probabilities(0.8, 0.1, 0.99, 0.4, 0.9, 0.2)
    labels = np.array([0, 1, 1, 1, 0, 1])  # row 2 is right; rows 1 and 4 are as confident
    assert report_page.most_confident_mistakes(predicted, labels, 20) == [1, 4, 0, 5, 3]
    assert report_page.most_confident_mistakes(predicted, labels, 2) == [1, 4]


def test_the_largest_errors_come_first():
    predictions, labels = np.array([1.0, 5.0, 2.0, 0.0]), np.array([1.0, 3.0, 2.5, 3.0])
    assert report_page.largest_errors(predictions, labels, 3) == [3, 1, 2]


def test_marks_the_words_that_the_other_text_lacks():
    marked = report_page.mark_differences(["He said so on Monday.", "He said it, on Monday."], 99)
    assert marked == [
        [("He said", False), (" ", False), ("so", True), (" ", False), ("on Monday.", False)],
        [("He said", False), (" ", False), ("it,", True), (" ", False), ("on Monday.", False)],
    ]
    assert report_page.mark_differences(["a  b"], 99) == [[("a  b", False)]]
    assert report_page.mark_differences(["a b c d"], 2) == [[("a b …", False)]]


# ------------------------------------------------------------------------------------ in words


def test_says_whether_the_classifier_collapsed():
    labels = np.array([0, 1, 1, 1])
    said = " ".join(report_page.verdict(probabilities(0.9, 0.8, 0.7, 0.6), labels, ("no", "yes")))
    assert "has collapsed into one class: it predicts 'yes' for every row" in said
    assert "75.0% of the rows" in said
    assert "Always answering 'yes', the most frequent label, would give 75.0%" in said
    said = " ".join(report_page.verdict(probabilities(0.1, 0.8, 0.7, 0.6), labels, ("no", "yes")))
    assert "has not collapsed" in said
    assert "'yes' for 3 and 'no' for 1 of the rows" in said
    three = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    said = " ".join(report_page.verdict(three, np.array([0, 1]), ("a", "b", "c")))
    assert "1 of the 3 classes it never predicts: 'c'." in said


def test_says_whether_a_regression_collapsed():
    labels = np.array([0.0, 2.0, 5.0])
    assert "has collapsed" in report_page.verdict(np.array([2.0, 2.001, 2.0]), labels, ())[0]
    assert "has not collapsed" in report_page.verdict(np.array([1.0, 2.0, 3.0]), labels, ())[0]


# --------------------------------------------------------------------------------- whole pages


def write_folder(folder, task, predictions):
    """A page of made-up figures in `folder`, as a run of one evaluation would leave it."""
    names = [name for name in metrics.metric_names(task.metrics) if name != "loss"]
    scores = {f"eval_{name}": 0.75 for name in names} | {"eval_loss": 0.5}
    logged = {"loss": 0.7, "learning_rate": 1e-4, "examples_per_second": 20.0}
    log = [{"update": 1, **logged}, {"update": 2, **logged}, {"update": 2, **scores}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "predictions").mkdir()
    (folder / "predictions" / f"{task.validation[0]}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in predictions)
    )
    texts = ("<script>alert(1)</script> & one", "<b>two</b>")
    results = {
        **scores,
        **{f"eval_{name}_ci95": [0.7, 0.8] for name in names},
        "eval_num_rows": len(predictions),
        "best_update": 2,
        "num_updates": 2,
    }
    config = dict.fromkeys(report_page.SETTINGS) | {"max_length": 64, "seed": 1, "task_name": None}
    facts = ("model", "model_revision", "data", "data_fingerprint", "device", "precision", "commit")
    manifest = dict.fromkeys(facts, "x") | {"command": "train <b>", "versions": {"torch": "2"}}
    return report_page.write_page(
        folder,
        task=task,
        results=results,
        manifest=manifest,
        config=config,
        rows=[dict(zip(task.columns, texts, strict=False))] * len(predictions),
        lengths=[3, 8, 5],
        padding={"fixed length": 0.4, "plain dynamic": 0.3, "this run": 0.1},
    )


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_texts_are_shown_and_not_run(tmp_path):
    line = {"index": 0, "prediction": "<i>", "label": "b", "probabilities": {"<i>": 0.9, "b": 0.1}}
    write_folder(tmp_path, task_of_files(("text",), ("<i>", "b")), [line])
    page = Tags((tmp_path / "report" / "index.html").read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> & one" in page.text
    assert "predicted <i>" in " ".join(page.text.split())


def test_a_regression_has_a_scatter_instead_of_classes(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "calibration.png").write_bytes(PNG)  # of a classifier, there before
    lines = [
        {"index": row, "prediction": value, "label": label}
        for row, (value, label) in enumerate([(1.0, 1.5), (4.0, 0.5), (2.0, 2.0)])
    ]
    drawn = write_folder(tmp_path, TASKS["stsb"], lines)
    assert "Predictions against labels" in drawn
    assert not {"Calibration", "Confusion matrix", "Precision and recall"} & set(drawn)
    assert set((tmp_path / "report").glob("*.png")) == {tmp_path / path for path in drawn.values()}
    text = " ".join(Tags((tmp_path / "report" / "index.html").read_text()).text.split())
    assert "Largest errors" in text
    assert "Row 1: predicted 4.00 (+3.50), labelled 0.50" in text


def test_three_classes(tmp_path):
    names = TASKS["mnli"].labels
    lines = [
        {"index": 0, "prediction": names[0], "label": names[label]}
        | {"probabilities": dict(zip(names, (0.6, 0.3, 0.1), strict=True))}
        for label in (0, 1, 2)
    ]
    drawn = write_folder(tmp_path, TASKS["mnli"], lines)
    assert {"Calibration", "Confusion matrix", "Precision and recall"} <= set(drawn)
    text = Tags((tmp_path / "report" / "index.html").read_text()).text
    assert "collapsed into one class: it predicts 'entailment'" in text


def test_many_classes(tmp_path):
    names = tuple(f"a class with the long name {number}" for number in range(40))
    line = {"index": 0, "prediction": names[0], "label": names[1]}
    line["probabilities"] = dict(zip(names, [0.61] + [0.01] * 39, strict=True))
    drawn = write_folder(tmp_path, task_of_files(("text",), names), [line])
    assert "Confusion matrix" in drawn
    assert "Precision and recall" not in drawn


# -------------------------------------------------------------------------------- of a real run


@pytest.fixture(scope="module")
def finished(flags, files, tmp_path_factory):
    """A real run, one of whose validation texts is a script."""
    folder = tmp_path_factory.mktemp("finished")
    with files["validation"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = {"sentence1": "<script>document.title = 'run'</script>", "sentence2": "<img src=x>"}
    # Twice, as either label: one of the two is a mistake.
    rows += [{**texts, "label": label} for label in "01"]
    path = write_csv(folder / "validation.csv", rows)
    results = main(
        parse_arguments(
            [
                *flags,
                f"--validation_file={path}",
                f"--output_dir={folder / 'out'}",
                "--eval_every=3",
            ]
        )
    )
    return folder / "out", results


def test_a_run_leaves_a_page_that_holds_everything(finished):
    folder, results = finished
    page = Tags((folder / "report" / "index.html").read_text())
    low, high = results["eval_accuracy_ci95"]
    for words in (f"{results['eval_accuracy']:.4f}", f"{low:.4f} to {high:.4f}", "'1'", "seed"):
        assert words in page.text
    assert "<script>document.title = 'run'</script>" in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 7
    assert all(source.startswith("data:image/png;base64,") for source in images)
    loads = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action") and not value.startswith("data:")
    ]
    assert loads == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}


def test_padding_is_that_of_the_runs_batches(finished):
    """53 rows in 7 batches, sorted by length: less padding than in the file's order."""
    text = Tags((finished[0] / "report" / "index.html").read_text()).text
    share, plain, fixed = map(float, re.findall(r"([\d.]+)%", text[text.index("this run's") :])[:3])
    assert 0 <= share < plain < fixed < 100


def test_the_model_card_shows_the_plots(finished):
    folder, results = finished
    card = ModelCard.load(folder / "README.md")
    shown = re.findall(r"!\[.+\]\((.+)\)", card.text)
    assert "report/learning_curve.png" in shown
    assert {folder / path for path in shown} == set((folder / "report").glob("*.png"))
    for path in shown:
        assert (folder / path).read_bytes().startswith(PNG)
    # The hub's validation needs the hub; this is what it reads.
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores["f1"] == results["eval_f1"]


def test_nothing_is_imported_for_plots_before_there_is_something_to_plot():
    code = "import sys, train_mrpc; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def browse(page, folder, width):
    """Open a page in a browser without network; its picture, and what its console says."""
    from PIL import Image

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    picture = folder / "page.png"
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # what the browser itself asks for
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            f"--screenshot={picture}",
            f"--window-size={width},1500",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert picture.exists(), done.stderr
    with Image.open(picture) as image:
        return image.convert("RGB"), [
            line for line in done.stderr.splitlines() if "CONSOLE" in line
        ]


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_renders_the_page_and_has_nothing_to_complain_of(finished, tmp_path, width):
    """Whatever the page asked for, its policy would refuse, and the console would tell."""
    image, console = browse(finished[0] / "report" / "index.html", tmp_path, width)
    assert console == []
    assert image.size == (width, 1500)
    # Text, lines and plots; an empty page or an error has few colours.
    assert len(image.getcolors(1 << 24)) > 500


def test_a_browser_would_complain_of_a_script_and_of_a_request(finished, tmp_path):
    """So the test above sees what it looks for."""
    page = (finished[0] / "report" / "index.html").read_text()
    bad = tmp_path / "bad.html"
    for tag in ("<script>console.log(1)</script>", "<img src='http://127.0.0.1:9/x.png'>"):
        bad.write_text(page.replace("</main>", tag + "</main>"))
        assert "Content Security Policy" in " ".join(browse(bad, tmp_path, 500)[1])
