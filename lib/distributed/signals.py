"""Signals that ask a run to stop.

Clusters reclaim machines with SIGTERM or SIGUSR1, people press Ctrl-C. `StopSignal` in
stop_signal.py turns a signal to any process into a decision of all. Imports nothing heavy, as it
listens before the slow imports.
"""

import multiprocessing
import os
import signal
import threading
import types

from lib.errors import TRY_AGAIN

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
)


class Signals:
    """The first stop signal that this process received; later ones change nothing.

    Attributes:
        received: that signal, or None.
        at_once: whether a signal ends the process where it is, which is right while there is
            nothing to save and no other process that would wait for this one.
        saves: whether the run has something to save before it stops.
        launcher: whether this process only starts those that train, and passes signals on to them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = self.saves = self.launcher = False

    def listen(self, *, launcher: bool = False) -> None:
        """Install the handlers; call this in the main thread."""
        self.launcher = launcher
        # The launcher of TPUs would take a child that ends at once for one that crashed.
        is_child = multiprocessing.parent_process() is not None
        self.at_once = os.environ.get("WORLD_SIZE", "1") == "1" and not is_child
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def save_first(self) -> None:
        """From now on the run has something to save before it stops."""
        self.at_once, self.saves = False, True

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self.launcher and _passed_on(number):
            return
        if self.at_once:
            _say(f"stopped by {self.received.name} before the first update")
            # Not an exception: libraries swallow some while they import, and go on half imported.
            os._exit(TRY_AGAIN)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # At once, and below the progress bar: under a launcher the prompt may be back already.
            doing = "saving" if self.saves else "stopping"
            _say(f"{self.received.name} received: {doing}, please wait", before="\n")


def _passed_on(number: int) -> bool:
    """Pass a signal on to the processes that this one started; kill them if one is not ready."""
    processes = [child.pid for child in multiprocessing.active_children() if child.pid]
    ready = bool(processes) and all(map(_listens, processes))
    for process in processes:
        os.kill(process, number if ready else signal.SIGKILL)
    return ready


def _listens(process: int) -> bool:
    """True once a process handles SIGTERM, of which it would die before (on Linux, as TPUs are)."""
    with open(f"/proc/{process}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def _say(line: str, before: str = "") -> None:
    # Unbuffered: the signal may have interrupted a print to the same stream.
    os.write(2, f"{before}train_mrpc.py: {line}\n".encode())


def ignore_stop_signals(*_: object) -> None:
    """Ignore the stop signals, which would kill the interpreter during its shutdown.

    Also used in the workers of a DataLoader, whose death would fail the training. On TPUs a run is
    in a thread, which cannot, and the interpreter is the launcher's.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
