"""The sentences and plots of the report, which a browser opens as it is."""

import csv
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn.metrics
from conftest import ROOT, write_csv
from finished_run import write_finished_run

from lib.cli.parsing import parse_arguments
from lib.data.tasks import TASKS, task_of_files
from lib.report.page import mistakes, plots, render, scores
from lib.training import curves
from train_mrpc import main

PNG = b"\x89PNG\r\n\x1a\n"


def probabilities(*of_class_1):
    return np.array([[1 - value, value] for value in of_class_1])


# ------------------------------------------------------------------------------------ figures


def test_calibration_by_hand():
    """Confidences 0.6, 0.7 | 0.9, 0.95, 1.0 in bins of a fifth; 0.6 still belongs to the third."""
    predicted = probabilities(0.4, 0.7, 0.9, 0.05, 1.0)
    labels = np.array([0, 0, 1, 0, 0])
    confidence, accuracy, counts = curves.calibration_bins(predicted, labels, num_bins=5)
    assert counts.tolist() == [0, 0, 1, 1, 3]
    assert confidence[2:] == pytest.approx([0.6, 0.7, 0.95])
    assert accuracy[2:] == pytest.approx([1, 0, 2 / 3])
    assert np.isnan(confidence[:2]).all()
    # (1 x 0.4 + 1 x 0.7 + 3 x (0.95 - 2/3)) / 5
    error = curves.expected_calibration_error(confidence, accuracy, counts)
    assert error == pytest.approx((0.4 + 0.7 + 0.85) / 5)


def test_calibration_of_three_classes_takes_the_predicted_one():
    predicted = np.array([[0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])
    confidence, accuracy, counts = curves.calibration_bins(predicted, np.array([2, 1]), num_bins=2)
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
    render._png(plots.confusion_matrix(one, one, ("$_$", "b")))


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
    one, same = (render._png(plots.learning_rate([1, 2], [0.1, 0.2])) for _ in range(2))
    assert one == same
    assert one.startswith(PNG)
    assert b"Software" not in one


# ------------------------------------------------------------------------------------ mistakes


def test_the_most_confident_mistakes_come_first():
    predicted = probabilities(0.8, 0.1, 0.99, 0.4, 0.9, 0.2)
    labels = np.array([0, 1, 1, 1, 0, 1])  # row 2 is right; rows 1 and 4 are as confident
    assert mistakes.worst_rows(predicted, labels, 20) == [1, 4, 0, 5, 3]
    assert mistakes.worst_rows(predicted, labels, 2) == [1, 4]


def test_the_largest_errors_come_first():
    predictions, labels = np.array([1.0, 5.0, 2.0, 0.0]), np.array([1.0, 3.0, 2.5, 3.0])
    assert mistakes.worst_rows(predictions, labels, 3) == [3, 1, 2]


def test_marks_the_words_that_the_other_text_lacks():
    marked = mistakes.mark_differences(["He said so on Monday.", "He said it, on Monday."])
    assert marked == [
        [("He said", False), (" ", False), ("so", True), (" ", False), ("on Monday.", False)],
        [("He said", False), (" ", False), ("it,", True), (" ", False), ("on Monday.", False)],
    ]
    assert mistakes.mark_differences(["a  b"]) == [[("a  b", False)]]


def test_marks_nothing_in_texts_that_differ_in_most_words():
    assert mistakes.mark_differences(["a b c d e", "a b c x y"]) is not None  # 3 of 5 words
    assert mistakes.mark_differences(["a b c d e", "a v w x y"]) is None  # 1 of 5


def test_long_texts_are_cut():
    assert mistakes.shorten("a b c d", 2) == "a b …"
    assert mistakes.shorten(" a  b ", 2) == "a  b"
    assert len(mistakes.shorten("x" * 1_000_000, 10)) < 200


# ------------------------------------------------------------------------------------ in words


def test_warns_of_a_collapse_and_only_then():
    labels, names = np.array([0, 1, 1, 1]), ("no", "yes")
    collapsed = scores.warning(probabilities(0.9, 0.8, 0.7, 0.6), labels, names)
    assert "collapsed to one class: it predicts 'yes' for every row" in collapsed
    assert scores.warning(probabilities(0.1, 0.8, 0.7, 0.6), labels, names) is None
    three = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])
    names = ("a", "b", "c")
    assert (
        scores.warning(three, np.array([0, 1, 2]), names) == "Some labels are never predicted: 'c'."
    )
    assert scores.warning(three, np.array([0, 1, 1]), names) is None  # and no row is a 'c'


def test_warns_of_a_regression_that_collapsed():
    labels = np.array([0.0, 2.0, 5.0])
    assert "collapsed" in scores.warning(np.array([2.0, 2.001, 2.0]), labels, ())
    assert scores.warning(np.array([1.0, 2.0, 3.0]), labels, ()) is None


def test_compares_the_result_with_one_without_a_model():
    labels = np.array([0, 1, 1, 1])
    said = scores.baseline(probabilities(0.9, 0.8, 0.7, 0.2), labels, ("no", "yes"))
    assert "50.0% of the rows" in said
    assert "Always predicting 'yes', the most frequent label, would give 75.0%" in said
    # |1 - 0| + |2 - 2| + |3 - 5| over 3; the median label is 2: |0 - 2| + 0 + |5 - 2| over 3
    said = scores.baseline(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0]), ())
    assert "error is 1.000" in said
    assert "median label would give 1.667" in said


# --------------------------------------------------------------------------------- whole pages


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


def text_of(folder):
    """The words of a page below its title and styles, each white space one blank."""
    body = (folder / "report" / "index.html").read_text().partition("<body>")[2]
    return " ".join(Tags(body).text.split())


def drawn(folder):
    return {path.stem for path in (folder / "report").glob("*.png")}


def line_of(names, label, shares):
    """A line of predictions: the class of highest share is the prediction."""
    prediction = names[int(np.argmax(shares))]
    line = {"index": 0, "prediction": prediction, "label": names[label]}
    return line | {"probabilities": dict(zip(names, shares, strict=True))}


def test_texts_are_shown_and_not_run(tmp_path):
    names = ("<i>", "b")
    write_finished_run(tmp_path, task_of_files(("text",), names), [line_of(names, 1, (0.9, 0.1))])
    page = Tags((tmp_path / "report" / "index.html").read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> & one" in page.text
    assert "predicted <i>" in text_of(tmp_path)


def test_the_page_opens_with_the_score_and_its_interval(tmp_path):
    names = TASKS["mrpc"].labels
    lines = [line_of(names, 0, (0.9, 0.1)), line_of(names, 1, (0.2, 0.8))]
    write_finished_run(tmp_path, TASKS["mrpc"], lines)
    interval = "(95% interval 0.7000 to 0.8000)"
    opening = f"{tmp_path.name} combined_score 0.7500 {interval} on 2 validation"
    assert opening in text_of(tmp_path)[:200]
    assert "collapsed" not in text_of(tmp_path)
    write_finished_run(tmp_path, TASKS["mrpc"], lines, metric_for_best_model="loss")
    assert f"{tmp_path.name} loss 0.5000 on 2 validation rows" in text_of(tmp_path)[:200]


def test_f1_names_its_class(tmp_path):
    """On the page, in its plots and in the model card; "f1" alone is nobody's."""
    names = ("no", "yes, $_$ | b")
    lines = [line_of(names, 0, (0.9, 0.1)), line_of(names, 1, (0.2, 0.8))]
    folder = write_finished_run(tmp_path / "run", task_of_files(("a", "b"), names), lines)
    named = "f1 of 'yes, $_$ | b'"
    assert text_of(folder).count("f1") == text_of(folder).count(named) > 1
    card = (folder / "README.md").read_text().partition("# ")[2]
    assert card.count("f1") == card.count(r"f1 of 'yes, \$\_\$ \| b'") == 1


def test_explains_that_two_texts_have_little_in_common(tmp_path):
    names = TASKS["mrpc"].labels
    lines = [line_of(names, 0, (0.1, 0.9))]
    texts = ("Who wrote the novel about whales?", "An entirely different sentence stands here.")
    write_finished_run(tmp_path, TASKS["mrpc"], lines, texts=texts)
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<mark>") == 1  # of the sentence that explains it
    assert "little in common, so no words are marked" in text_of(tmp_path)


def test_a_regression_has_a_scatter_instead_of_classes(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "calibration.png").write_bytes(PNG)  # of a classifier, there before
    lines = [
        {"index": row, "prediction": value, "label": label}
        for row, (value, label) in enumerate([(1.0, 1.5), (4.0, 0.5), (2.0, 2.0)])
    ]
    write_finished_run(tmp_path, TASKS["stsb"], lines)
    runs = {"learning_curve", "learning_rate", "throughput", "token_lengths"}
    assert drawn(tmp_path) == runs | {"score_scatter"}
    assert "Largest errors" in text_of(tmp_path)
    assert "Row 1: predicted 4.00 (+3.50), labeled 0.50" in text_of(tmp_path)


def test_three_classes(tmp_path):
    names = TASKS["mnli"].labels
    lines = [line_of(names, label, (0.6, 0.3, 0.1)) for label in (0, 1, 2)]
    write_finished_run(tmp_path, TASKS["mnli"], lines)
    assert {"calibration", "confusion_matrix", "precision_recall"} <= drawn(tmp_path)
    assert "collapsed to one class: it predicts 'entailment'" in text_of(tmp_path)


def test_many_classes(tmp_path):
    names = tuple(f"a class with the long name {number}" for number in range(40))
    line = line_of(names, 1, [0.61] + [0.01] * 39)
    write_finished_run(tmp_path, task_of_files(("text",), names), [line])
    assert "confusion_matrix" in drawn(tmp_path)
    assert "precision_recall" not in drawn(tmp_path)


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


def test_the_page_of_a_run_needs_no_other_file(finished):
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
    share, plain, fixed = map(
        float, re.findall(r"([\d.]+)%", text[text.index("the longest") :])[:3]
    )
    assert 0 <= share < plain < fixed < 100


def test_the_script_does_not_import_the_report():
    late = ["matplotlib", "lib.report.card", "lib.report.page.render"]
    code = f"import sys, train_mrpc; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def browse(page, folder, width):
    """Open a page in a browser without network; return its picture and console lines."""
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
            f"--window-size={width},3000",
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
@pytest.mark.processes
def test_a_browser_renders_the_page_without_errors(finished, tmp_path, width):
    """The page's policy blocks every request, and the console would report it."""
    image, console = browse(finished[0] / "report" / "index.html", tmp_path, width)
    assert console == []
    assert image.size == (width, 3000)
    # Text, lines and plots; an empty page or an error has few colors.
    assert len(image.getcolors(1 << 24)) > 500


@pytest.mark.processes
def test_a_browser_reports_a_script_and_a_request(finished, tmp_path):
    """So the test above would fail."""
    page = (finished[0] / "report" / "index.html").read_text()
    bad = tmp_path / "bad.html"
    for tag in ("<script>console.log(1)</script>", "<img src='http://127.0.0.1:9/x.png'>"):
        bad.write_text(page.replace("</main>", tag + "</main>"))
        assert "Content Security Policy" in " ".join(browse(bad, tmp_path, 500)[1])


# ------------------------------------------------------------------------------------- classes


def test_precision_and_recall_of_each_class_by_hand(tmp_path):
    """Of 3 rows labeled yes 2 are found; of 3 predicted so 1 is labeled no."""
    predicted, labels = probabilities(0.9, 0.8, 0.3, 0.7, 0.1), np.array([1, 1, 1, 0, 0])
    rows = scores.class_table(predicted, labels, ("no", "yes"))
    assert rows == [
        ("no", "0.5000", "0.5000", "0.5000", "2"),
        ("yes", "0.6667", "0.6667", "0.6667", "3"),
    ]
    assert scores.class_table(np.array([0.5]), np.array([1.0]), ()) == []
    lines = [
        {
            "index": row,
            "prediction": ("no", "yes")[int(values.argmax())],
            "probabilities": dict(zip(("no", "yes"), values.tolist(), strict=True)),
            "label": ("no", "yes")[label],
        }
        for row, (values, label) in enumerate(zip(predicted, labels, strict=True))
    ]
    folder = write_finished_run(tmp_path / "run", task_of_files(("a", "b"), ("no", "yes")), lines)
    page = (folder / "report" / "index.html").read_text()
    assert "<td>yes</td><td>0.6667</td><td>0.6667</td><td>0.6667</td><td>3</td>" in page
