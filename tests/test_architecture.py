"""The shape of the source: imports run one way, and files stay short enough to read."""

import ast
import itertools
import re
from pathlib import Path

import pytest
from conftest import ROOT

# A wing imports from wings further down, never from its own line or above.
LAYERS = [
    {"predict", "export", "finished"},
    {"report", "compare", "doctor", "publish"},
    {"tracking", "calibration"},
    {"training", "checkpoints"},
    {"cli"},
    {"data", "model"},
    {"hub", "distributed", "demo"},
    {"backends"},
    {"errors"},
]
LEVEL = {wing: level for level, wings in enumerate(LAYERS) for wing in wings}

SOURCES = sorted((ROOT / "lib").rglob("*.py"))
SCRIPT = ROOT / "train_mrpc.py"


def wing_of(path):
    return path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")


def imported(path):
    """The modules of lib that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lib."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_between_wings_run_one_way(path):
    if path.name == "__init__.py":
        assert not list(imported(path))
        return
    wing = wing_of(path)
    others = {name.split(".")[1] for name in imported(path)} - {wing}
    wrong = {other for other in others if LEVEL[other] <= LEVEL[wing]}
    assert not wrong, f"{wing} imports {', '.join(sorted(wrong))}"


def test_every_wing_has_a_docstring():
    for folder in {path.parent for path in SOURCES} - {ROOT / "lib"}:
        tree = ast.parse((folder / "__init__.py").read_text())
        assert ast.get_docstring(tree), folder
        assert len(tree.body) == 1, f"{folder}/__init__.py holds more than its docstring"


def test_only_the_script_and_the_command_line_know_the_configuration():
    for path in SOURCES:
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        assert wing_of(path) == "cli" or "TrainConfig" not in names, path


def test_folders_files_and_functions_stay_short():
    for folder in {path.parent for path in SOURCES} - {ROOT / "lib"}:
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc"]
        assert len(files) <= 7, folder
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
        for function in functions(path):
            documented = isinstance(function.body[0], ast.Expr)
            docstring = length(function.body[0]) if documented else 0
            assert length(function) - docstring <= 60, f"{path}: {function.name}"


def test_the_script_is_read_in_one_sitting():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 330
    for function in functions(SCRIPT):
        assert length(function) <= 160, function.name
        inner = [node for node in ast.walk(function) if isinstance(node, FUNCTIONS)]
        assert inner == [function], f"{function.name} holds a nested function"
    (loop,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.While))
    assert length(loop) <= 75
    body = ast.get_source_segment(source, loop)
    for step in ("model(**batch)", ".backward(", ".clip_grad_norm_(", "optimizer.step()"):
        assert body.count(step) == 1, step
    for step in ("schedule.step()", "evaluate(", "checkpoints.save(", "best.save()"):
        assert body.count(step) == 1, step


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def functions(path):
    tree = ast.parse(Path(path).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def test_spelling_is_american():
    british = r"(?i)\b\w*(tokenis|normalis|initialis|summaris|colour|centred|labelled|modelling)\w*"
    for path in [SCRIPT, *SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        found = re.findall(british, path.read_text())
        assert not found, f"{path}: {found}"


def test_the_readme_leads_from_the_course_to_the_lines_of_the_script():
    lines = SCRIPT.read_text().splitlines()
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "(train_mrpc.py#L" in line
    ]
    expected = [
        "splits.tokenized(",
        "DataCollatorWithPadding(",
        "load_model(",
        "torch.optim.AdamW(",
        "accelerator.prepare(",
        "evaluate(",
    ]
    numbers = [re.search(r"\[line (\d+)\]\(train_mrpc.py#L(\d+)\)", row).groups() for row in rows]
    assert all(shown == linked for shown, linked in numbers)
    assert [code in lines[int(number) - 1] for code, (number, _) in zip(
        expected, numbers, strict=True)] == [True] * 6  # fmt: skip


def test_the_map_names_files_and_names_that_exist():
    table = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| .+\? \| `([^`]+)` \| `([^`]+)`", table, re.MULTILINE)
    assert len(rows) >= 10
    for file, name in rows:
        source = (ROOT / file).read_text()
        assert name.split(".")[-1].removeprefix("except ") in source, (file, name)


def table_rows(text, first_cell):
    """The cells of each row of the Markdown table that starts with this cell."""
    lines = text[text.index(f"| {first_cell} |") :].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


def test_each_cell_of_the_table_of_backends_names_a_test_that_exists():
    page = (ROOT / "docs" / "backends.md").read_text()
    shown = {}
    for keys, test in table_rows(page, "key"):
        file, name = re.match(r"`(\S+)::(\w+)`", test).groups()
        assert f"def {name}(" in (ROOT / file).read_text(), test
        shown |= dict.fromkeys(keys.split(", "), name)
    backends = table_rows(page, "backend")
    cells = [cell for row in backends for cell in row[3:] if cell != "*not run*"]
    assert sorted(cells) == sorted(shown)
    files = {path.name for path in (ROOT / "accelerate_configs").iterdir()}
    assert {row[1].strip("`") for row in backends} == files


def test_the_readme_lists_the_backends_as_they_were_run():
    page = (ROOT / "docs" / "backends.md").read_text()
    run_on = {row[1].strip("`"): row[2] for row in table_rows(page, "backend")}
    readme = table_rows((ROOT / "README.md").read_text(), "machine")
    found = {re.search(r"\w+\.yaml", row[2]).group(): row[1] for row in readme if ".yaml" in row[2]}
    assert found == run_on
