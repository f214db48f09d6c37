"""Which flags a resumed run may change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.cli.config import FLAGS
from lib.errors import InputError

# Flags that do not decide what a run computes. Rows are identified by their content, wherever
# they are stored.
FREE_FLAGS = {name for name, declared in FLAGS.items() if declared.resume == "free"}

# Flags that may grow: the run then continues for longer.
LONGER_FLAGS = {name for name, declared in FLAGS.items() if declared.resume == "longer"}


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Check that a run with the configuration `now` may resume one with `before`.

    Args:
        where: the folder or checkpoint that `before` comes from.

    Raises:
        InputError: they differ in a flag that decides the result; the message shows each.
    """
    differences = [
        f"{name} {before[name]!r} there, {value!r} here"
        for name, value in now.items()
        if name in before
        and name not in FREE_FLAGS
        and before[name] != value
        and not (name in LONGER_FLAGS and before[name] and value and value > before[name])
    ]
    if differences:
        raise InputError(
            f"{where} belongs to another run: {'; '.join(differences)}. Give the same values, "
            "another --output_dir, or --overwrite_output_dir to replace that run"
        )
