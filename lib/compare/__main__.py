"""Compare finished runs: a table over seeds, whether two sets differ, or a leaderboard.

    python -m lib.compare runs/default.s*
    python -m lib.compare runs/default.s* --against runs/plain.s*
    python -m lib.compare runs/default.s* --against runs/plain.s* --against runs/tuned.s*
    python -m lib.compare runs/default.s* --against runs/plain.s* --format html > comparison.html
    python -m lib.compare runs/default.s* --against runs/plain.s* --plot comparison.png
    python -m lib.compare --leaderboard runs/*
    python path/to/lib/compare runs/default.s*            from any folder

A set is the runs of one recipe, each with its own seed or fold. Set A is compared with each of the
others by what the runs predict for each validation row; `lib/compare/significance.py` explains the
method. The verdict is on one metric, the one by which GLUE scores the task, and corrected for the
number of sets: with several tests at 5% each, one would come out "different" by chance more often.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started by its path: the folder above lib is not where Python looks
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from lib.compare.comparison import compare_runs
from lib.compare.leaderboard.boards import rank_runs
from lib.compare.output.plot import check_plot, save_plot
from lib.compare.output.render import FORMATS
from lib.compare.runs import read_run
from lib.errors import InputError


def main(arguments: Sequence[str]) -> int:
    """Print the comparison and return the exit status: 2 for runs that cannot be compared."""
    summary, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m lib.compare", description=summary)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders: set A")
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="RUN",
        action="append",
        default=[],
        help="output folders: set B; give it again for C, D, ...",
    )
    parser.add_argument(
        "--leaderboard", action="store_true", help="a line for each run, the best first"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="text")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the scores of all runs: .png, .svg or .pdf"
    )
    given = parser.parse_args(arguments)
    try:
        if given.leaderboard and (given.against or given.plot):
            raise InputError("--leaderboard ranks one list of runs: leave out --against and --plot")
        if given.plot:
            check_plot(given.plot)
        if given.leaderboard:
            content = rank_runs(given.runs)
        else:
            parts = (given.runs, *given.against)
            content = compare_runs(*([read_run(folder) for folder in part] for part in parts))
        if given.plot:
            save_plot(content, given.plot)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(FORMATS[given.format](content), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
