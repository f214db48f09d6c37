"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line: which field or file, what was found, what was expected, and the
    remedy. The script prints it once, without a traceback, and exits with status 2.
    """
