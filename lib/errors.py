"""The errors that end a run with one line instead of a traceback."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the script exits with status 2.

    The message is one line: which flag or file, what was found, what was expected, the remedy.
    """


class NonFiniteError(RuntimeError):
    """The loss or the gradient of an update is not finite; the script exits with status 1.

    The update was not applied.
    """


class LostProcessError(RuntimeError):
    """Another process of the run is gone; the script names it and exits with status 1."""


class PublishError(RuntimeError):
    """The hub did not take a finished run, which is complete on disk; exits with status 1."""


# EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again.
TRY_AGAIN = 75


class Preempted(BaseException):
    """A signal stopped the run, which can be resumed; the script exits with status `TRY_AGAIN`.

    Not an Exception, so that no handler of those catches it.

    Args:
        signal_name: such as "SIGTERM".
        when: the rest of the line that the user reads.
    """

    def __init__(self, signal_name: str, when: str = "before the first update") -> None:
        super().__init__(f"stopped by {signal_name} {when}")
        self.signal_name = signal_name
