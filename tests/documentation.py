"""The code of the documentation, for tests that run it as it stands."""

import itertools
import re
from typing import Any

from conftest import ROOT


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a page in one language, but those below a paragraph "Not run here"."""
    paragraphs = re.split(r"\n{2,}(?=```)|(?<=```)\n{2,}", (ROOT / "docs" / page).read_text())
    code = []
    for before, block in itertools.pairwise(paragraphs):
        head, _, body = block.partition("\n")
        if head == f"```{language}" and "Not run here" not in before.rpartition("\n\n")[2]:
            code.append(body.removesuffix("```"))
    return code


def run_python(page: str) -> dict[str, Any]:
    """Run the Python blocks of a page, one after the other, and return their variables."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), variables)
    return variables
