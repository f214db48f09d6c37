"""Signals that ask a run to stop: remembered, and acted on where nothing is lost.

Clusters take machines back with SIGTERM or SIGUSR1, people press Ctrl-C. `processes.Agreement`
makes of a signal on any process a decision of all. Imports nothing heavy, as it listens before the
seconds that other imports take.
"""

import signal
import sys
import types

from lib.errors import TRY_AGAIN

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class Signals:
    """The first signal that asked this process to stop; more of them change nothing.

    Attributes:
        received: that signal, or None.
        at_once: whether a signal ends the process where it is, which is right while there is
            nothing to save and no other process that would wait for this one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = False

    def listen(self, *, at_once: bool) -> None:
        """Take the signals over; to be called in the main thread."""
        self.at_once = at_once
        for name in STOP_SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self.at_once:
            print(
                f"train_mrpc.py: stopped by {self.received.name} before the first update",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(TRY_AGAIN)


def ignore_stop_signals(_: int) -> None:
    """In a worker of a DataLoader, whose end would be an error in the process that it works for."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
