"""Writing the page and its plots; the template holds the layout.

Matplotlib and Jinja take a second to import: import this module only to write a page.
"""

import base64
import io
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from lib.checkpoints.atomic import replacing, write_text, writing
from lib.report.finished_run import FOLDER, PAGE_FILE, FinishedRun
from lib.report.page.figures import NAMES, Plot, draw
from lib.report.page.mistakes import LEAST_SIMILARITY, mistakes
from lib.report.page.scores import (
    baseline,
    calibration_rows,
    choice,
    class_table,
    headline,
    score_tables,
    warning,
)

DOTS_PER_INCH = 200


def write_page(run: FinishedRun) -> dict[str, str]:
    """Write report/index.html and its plots.

    Returns:
        The plots as title and path relative to the output folder, in the order of the page.

    Raises:
        InputError: they cannot be written.
    """
    plots = draw(run)
    pictures = {name: _png(plot.figure) for name, plot in plots.items()}
    page = _html(run, plots, pictures)
    target = run.folder / FOLDER
    with writing(target):
        target.mkdir(exist_ok=True)
        for name in set(NAMES) - set(plots):
            (target / f"{name}.png").unlink(missing_ok=True)  # of another run in this folder
    for name, picture in pictures.items():
        with replacing(target / f"{name}.png") as new:
            new.write_bytes(picture)
    write_text(run.folder / PAGE_FILE, page)
    return {plot.title: f"{FOLDER}/{name}.png" for name, plot in plots.items()}


def _html(run: FinishedRun, plots: dict[str, Plot], pictures: dict[str, bytes]) -> str:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    predicted, labels, names = run.predicted, run.labels, run.task.labels
    return templates.get_template("template.html").render(
        run=run,
        headline=headline(run),
        choice=choice(run),
        warning=warning(predicted, labels, names),
        baseline=baseline(predicted, labels, names),
        tables=score_tables(run),
        calibration=calibration_rows(run),
        classes=class_table(predicted, labels, names),
        plots=plots.values(),
        sources=[_data_url(picture) for picture in pictures.values()],
        mistakes=mistakes(predicted, labels, run.texts, names),
        least_similarity=LEAST_SIMILARITY,
        details=_details(run),
    )


def _details(run: FinishedRun) -> list[tuple[str, str]]:
    """Where the run comes from, as name and value."""
    known = run.provenance
    revision = f", revision {known['model_revision']}" if known["model_revision"] else ""
    return [
        ("model", run.base_model + revision),
        ("data", run.data),
        ("data fingerprint", known["data_fingerprint"]),
        ("settings", ", ".join(f"{name} {value}" for name, value in run.settings.items())),
        ("updates", f"{run.num_updates}; the saved model is that of update {run.best_update}"),
        ("device", f"{known['device']}, precision {known['precision']}"),
        ("training", run.cost),
        ("versions", ", ".join(f"{name} {number}" for name, number in known["versions"].items())),
        ("commit", known["commit"] or "not run from a git repository"),
        ("command", known["command"]),
    ]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without Matplotlib's version: the same figure is the same file.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
