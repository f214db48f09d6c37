"""A comparison or a leaderboard as text, Markdown, JSON or HTML."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.compare.sentences import points


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _tables(content: Mapping[str, Any]) -> list[Table]:
    """Make a table of figures for each set, one of differences from each other set, and one of all.

    Of a leaderboard, make a table for each board.
    """
    if "boards" in content:
        return [_board_table(board) for board in content["boards"]]
    tables = [_figures_table(label, one) for label, one in content["sets"].items()]
    differences = content.get("differences", {})
    for label, found in differences.items():
        rows = tuple(
            (metric["title"], *_difference_cells(metric)) for metric in found["metrics"].values()
        )
        tables.append(Table(f"A - {label}, in points", ("", *DIFFERENCE_HEADER), rows))
    if len(differences) > 1:
        rows = tuple(
            (
                f"A - {label} ({content['sets'][label]['name']})",
                *_difference_cells(found["metrics"][content["deciding_metric"]]),
                f"{found['adjusted_p_value']:.2g}",
                str(found["num_pairs"]),
            )
            for label, found in differences.items()
        )
        header = ("", *DIFFERENCE_HEADER, f"p of {len(differences)} (Holm)", "pairs")
        title = f"All differences, in points of {content['deciding_metric']}"
        tables.append(Table(title, header, rows))
    return tables


DIFFERENCE_HEADER = ("difference", "standard error", "95% interval", "detectable", "p")


def _difference_cells(metric: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        points(metric["difference"], sign=True),
        points(metric["standard_error"]),
        " to ".join(points(end, sign=True) for end in metric["interval"]),
        points(metric["detectable"]),
        f"{metric['p_value']:.2g}",
    )


def _figures_table(label: str, one_set: Mapping[str, Any]) -> Table:
    rows = []
    for name, figure in one_set["figures"].items():
        # Speeds and seconds need no more than one decimal.
        decimals = 4 if name.startswith("eval_") else 1
        deviation, interval = figure["standard_deviation"], figure["interval"]
        ends = [
            f"{figure[end]['value']:.{decimals}f} ({Path(figure[end]['run']).name})"
            for end in ("best", "worst")
        ]
        rows.append(
            (
                figure["title"],
                str(figure["num_runs"]),
                f"{figure['mean']:.{decimals}f}",
                "" if deviation is None else f"{deviation:.{decimals}f}",
                "" if interval is None else " to ".join(f"{end:.{decimals}f}" for end in interval),
                *ends,
            )
        )
    header = ("", "n", "mean", "sd", "95% interval of the mean", "best", "worst")
    return Table(f"{label}: {', '.join(one_set['runs'])}", header, tuple(rows))


def _board_table(board: Mapping[str, Any]) -> Table:
    """A row for each run; the scores that rank them have their intervals."""
    runs, titles, metric = board["runs"], dict(board["titles"]), board["metric"]
    columns: dict[str, list[str]] = {
        "run": [run["run"] for run in runs],
        "model": [Path(run["model"]).name for run in runs],
        "seed": [str(run["seed"]) for run in runs],
    }
    for name in runs[0]["settings"]:
        values = [run["settings"][name] for run in runs]
        columns[name] = ["" if value is None else str(value) for value in values]
    title = titles.pop(metric)
    columns[f"validation {title}"] = [_score(run["validation"][metric]) for run in runs]
    del titles["loss"]
    for name, other in titles.items():
        columns[other] = [f"{run['validation'][name]['value']:.4f}" for run in runs]
    if any(run["test"] for run in runs):
        columns[f"test {title}"] = [_score(run["test"].get(metric)) for run in runs]
    columns["examples/s"] = [f"{run['train_examples_per_second']:.1f}" for run in runs]
    heading = f"{board['task'] or 'own data'}, {board['num_rows']} validation rows"
    return Table(heading, tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    return f"{score['value']:.4f} ({low:.4f} to {high:.4f})"


def as_text(content: Mapping[str, Any]) -> str:
    blocks = []
    for table in _tables(content):
        lines = (table.header, *table.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([table.title, *aligned]))
    return "\n\n".join([*blocks, "\n".join(content["sentences"])]) + "\n"


def as_markdown(content: Mapping[str, Any]) -> str:
    blocks = []
    for table in _tables(content):
        rule = "|---" * len(table.header) + "|"
        rows = [_markdown_row(table.header), rule, *map(_markdown_row, table.rows)]
        blocks.append("\n".join([f"**{_markdown(table.title)}**", "", *rows]))
    sentences = "\n".join(f"- {_markdown(sentence)}" for sentence in content["sentences"])
    return "\n\n".join([*blocks, sentences]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON lacks by null, such as the normal's infinite degrees of freedom."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_html(content: Mapping[str, Any]) -> str:
    """A page that needs no other file and no network."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    page = templates.get_template("template.html")
    return page.render(sentences=content["sentences"], tables=_tables(content))


FORMATS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
    "html": as_html,
}
