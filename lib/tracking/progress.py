"""What a run prints while it trains: a progress bar on a terminal, lines in a log file."""

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

COLUMN = 8  # characters, at least


class Progress:
    """A progress bar and a table of evaluations on a terminal; a line for each of them elsewhere.

    Args:
        update: updates done before this start.
        shown: False on all processes but one.
    """

    def __init__(self, num_updates: int, update: int, *, shown: bool) -> None:
        self.num_updates = num_updates
        self.first = update
        self.shown = shown
        self.on_terminal = shown and sys.stderr.isatty()
        self.started = time.perf_counter()
        self.has_header = False
        self.bar = tqdm(
            total=num_updates,
            initial=update,
            unit="update",
            disable=not self.on_terminal,
            smoothing=0.1,
        )

    def is_first(self, update: int) -> bool:
        """True for the first update since this start."""
        return update == self.first + 1

    def advance(self) -> None:
        """Count an update."""
        self.bar.update()

    def first_loss(self, update: int, loss: float) -> None:
        """Show the loss of the first update, long before the first logged line."""
        if self.on_terminal:
            self.bar.set_postfix_str(f"loss {loss:.4f}")
        else:
            self.say(f"update {update}/{self.num_updates}: loss {loss:.4f}")

    def training(self, update: int, values: Mapping[str, Any]) -> None:
        """Show the figures of a logged update."""
        figures = (
            f"loss {values['loss']:.4f}, {values['examples_per_second']:.1f} examples/s, "
            f"{values['tokens_per_second']:.0f} tokens/s"
        )
        if self.on_terminal:
            self.bar.set_postfix_str(figures)
            return
        elapsed = time.perf_counter() - self.started
        left = elapsed / max(1, update - self.first) * (self.num_updates - update)
        self.say(
            f"update {update}/{self.num_updates}, epoch {values['epoch']:.2f}: {figures}, "
            f"{left:.0f} s left"
        )

    def evaluation(
        self, update: int, epochs: float, scores: Mapping[str, float], *, is_best: bool, remark: str
    ) -> None:
        """Show an evaluation: a row of a table on a terminal, `epoch 0: {...}` in a log file.

        Args:
            epochs: that are done.
            remark: a warning about the scores, or nothing.
        """
        if not self.on_terminal:
            rounded = {name: round(score, 4) for name, score in scores.items()}
            warning = f" ({remark})" if remark else ""
            self.say(f"epoch {math.ceil(epochs) - 1}: {rounded}{warning}")
            return
        if not self.has_header:
            self.say(_row(["update", "epoch", *scores], scores))
            self.has_header = True
        cells = [str(update), f"{epochs:.2f}", *(f"{score:.4f}" for score in scores.values())]
        remarks = ["best"] * is_best + [remark] * bool(remark)
        self.say("  ".join([_row(cells, scores), *remarks]))

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self.on_terminal:
            self.bar.write(line)
        elif self.shown:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def _row(cells: Sequence[str], names: Mapping[str, float]) -> str:
    widths = [COLUMN, COLUMN, *(max(COLUMN, len(name)) for name in names)]
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def quiet_libraries() -> None:
    """Silence the load reports and progress bars of transformers and datasets."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # wandb and accelerate warn once per process of what this script handles itself.
    warnings.filterwarnings("ignore", category=UserWarning, module="accelerate.accelerator")
