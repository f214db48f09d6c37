"""One run at a time in an output folder."""

import errno
import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from lib.checkpoints.output import LOCK_FILE, writing
from lib.errors import InputError

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Keeps an output folder to one run at a time, until it is left or its process ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.file: TextIO | None = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def acquire(self, *, seconds: float) -> None:
        """Make the folder, and take it; a process that holds it may end within so many seconds.

        Raises:
            InputError: another process holds it, or it cannot be written.
        """
        if self.file is not None:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + seconds
        while not self._taken(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise InputError(
                    f"--output_dir {self.path.parent} is in use by another run ({holder}): wait "
                    "for it, stop it, or choose another folder"
                )
            time.sleep(0.5)
        self.file = file
        with writing(self.path):
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)

    @staticmethod
    def _taken(file: TextIO) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{file.name} cannot be locked here: start one run at a time", file=sys.stderr)
        return True
