"""Regenerate the report and the model card of finished runs, from their output folders.

python -m lib.report outputs/mrpc
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.report.finished_run import PAGE_FILE
from lib.report.results import write_report


def main(arguments: Sequence[str]) -> int:
    """Write the reports; return the exit status, 2 if a folder holds no finished run."""
    summary, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m lib.report", description=summary)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="the --output_dir of a run"
    )
    folders = parser.parse_args(arguments).folders
    try:
        write_report(*folders)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        print(folder / PAGE_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
