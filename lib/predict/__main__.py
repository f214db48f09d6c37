"""Predict rows with the model of a finished run.

    python -m lib.predict outputs/mrpc pairs.csv --output predictions.csv
    python -m lib.predict outputs/mrpc --text "He left." --text_pair "He has left."
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml \\
        -m lib.predict outputs/mrpc pairs.parquet

Reads what training reads: CSV, TSV, JSON Lines, JSON and Parquet, compressed or not. Several files
become one output, which keeps the order and the columns of its input. If the rows have labels, they
are scored. A command that was killed resumes when it is given again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lib.errors import InputError, LostProcessError
from lib.predict.prediction import predict_files, predict_text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage, on every process."""
        raise InputError(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, _ = __doc__.partition("\n\n")
    made = _Parser(prog="python -m lib.predict", description=summary, allow_abbrev=False)
    add = made.add_argument
    add("folder", type=Path, metavar="OUTPUT_DIR", help="the --output_dir of a finished run")
    add("files", nargs="*", metavar="FILE", help="rows to predict")
    add(
        "--output",
        type=Path,
        default=Path("predictions.jsonl"),
        metavar="FILE",
        help=".jsonl, .csv or .parquet; predictions.jsonl if not given",
    )
    add("--submission", type=Path, metavar="FILE", help="the file that gluebenchmark.com takes")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--batch_size", type=int, metavar="N", help="rows of a batch on each device")
    add("--text_columns", nargs="+", metavar="COLUMN", help="if not called as in training")
    add("--label_column", metavar="COLUMN", help="if not called as in training")
    add(
        "--threshold",
        metavar="fitted|P",
        help="predict the second of two classes where its probability is above",
    )
    add("--temperature", metavar="fitted|T", help="divide the logits, for the probabilities")
    add("--text", help="predict this text instead of files")
    add("--text_pair", metavar="TEXT", help="the second text of a pair")
    add(
        "--trust_remote_code",
        action="store_true",
        help="execute the code that came with the model, if the run trusted it",
    )
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        InputError: it contradicts itself.
        SystemExit: after `--help`.
    """
    given = parser().parse_args(arguments)
    if (given.text is None) == (not given.files):
        raise InputError("give either files or --text")
    if given.text_pair is not None and given.text is None:
        raise InputError("--text_pair without --text: give both")
    if given.batch_size is not None and given.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {given.batch_size}")
    if given.text_columns is not None and len(given.text_columns) > 2:
        raise InputError(f"--text_columns takes one or two names, got {len(given.text_columns)}")
    return given


def main(arguments: Sequence[str]) -> int:
    """Predict; return the exit status, 2 for what cannot be predicted."""
    try:
        given = parse(arguments)
        options = vars(given)
        text, text_pair = options.pop("text"), options.pop("text_pair")
        if text is None:
            predict_files(**options)
        else:
            texts = [text] if text_pair is None else [text, text_pair]
            names = ("folder", "threshold", "temperature", "trust_remote_code")
            print(predict_text(texts=texts, **{name: options[name] for name in names}))
    except (InputError, LostProcessError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LostProcessError):
            print(f"python -m lib.predict: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("stopped: give the same command again to resume", file=sys.stderr)
        return 130  # as shells report SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
