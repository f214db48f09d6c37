"""The errors that end a run with one line instead of a traceback."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line: which field or file, what was found, what was expected, and the
    remedy. The script prints it once, without a traceback, and exits with status 2.
    """


class NonFiniteError(RuntimeError):
    """The loss or the gradient of an update is not finite; the update was not applied.

    The script prints it once, and exits with status 1.
    """


class LostProcessError(RuntimeError):
    """Another process of the run is gone. The script names it, and exits with status 1."""


# EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again.
TRY_AGAIN = 75


class Preempted(BaseException):
    """A signal asked the run to end, and it has left everything in order.

    Not an Exception, so that nobody's handler of those takes it. The script says so in one line,
    and exits with status `TRY_AGAIN`.
    """
