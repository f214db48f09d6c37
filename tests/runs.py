"""Runs of the script in this process, and comparisons of what they leave."""

import contextlib
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import read_metrics, read_weights

from lib.cli.parsing import parse_arguments
from lib.cli.startup import exit_status
from lib.distributed.signals import Signals
from lib.errors import Preempted
from lib.report.results import write_report
from train_mrpc import main


def run(
    flags: Sequence[str],
    folder: Path,
    *more: str,
    report: bool = False,
    signals: Signals | None = None,
) -> dict[str, Any]:
    """Run the script into `folder` and return its results.

    Args:
        more: flags that override `flags`.
        report: draw the report and write the model card, which takes longer than the training.
        signals: those that the run receives; none by default.
    """
    config = parse_arguments([*flags, f"--output_dir={folder}", *more])
    draw = write_report if report else lambda *_: None
    with mock.patch("lib.report.results.write_report", draw):
        return main(config, signals or Signals())


class StopAfter(Signals):
    """A SIGTERM that arrives after the run has checked for one `num_checks` times."""

    def __init__(self, num_checks: int) -> None:
        super().__init__()
        self.left = num_checks

    @property
    def received(self) -> signal.Signals | None:
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None

    @received.setter
    def received(self, _: None) -> None:
        pass


def run_until(flags: Sequence[str], folder: Path, num_checks: int, *more: str) -> str:
    """Run until the check after `num_checks` others finds a signal; return the run's last words."""
    with pytest.raises(Preempted) as stopped:
        run(flags, folder, *more, signals=StopAfter(num_checks))
    return str(stopped.value)


def run_and_exit(flags: Sequence[str], folder: Path, *more: str) -> int:
    """Return the exit status of a run that ends with an error, which is printed as for users."""
    # The stop signals would stay ignored in this process.
    with (
        mock.patch("lib.cli.startup.ignore_stop_signals"),
        pytest.raises(SystemExit) as left,
        exit_status(),
    ):
        run(flags, folder, *more)
    return left.value.code


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process become larger than `size` bytes, as `ulimit -f` does."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def error_line(printed: str) -> str:
    """Return the only line on stderr that reports an error."""
    lines = [line for line in printed.splitlines() if "error:" in line]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest absolute difference between two sets of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same_course(folder: Path, reference: Path) -> None:
    """The same learning rates, losses, gradients and weights, update by update."""
    lines, expected = read_metrics(folder), read_metrics(reference)
    for name in ("learning_rate", "loss", "grad_norm"):
        values = [line[name] for line in lines if name in line]
        wanted = [line[name] for line in expected if name in line]
        assert len(wanted) == 7
        assert values == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    assert difference(read_weights(folder / "epoch_0"), read_weights(reference / "epoch_0")) < 1e-6
