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
