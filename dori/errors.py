"""The one exception that a user is meant to read."""


class DoriError(Exception):
    """A mistake in what the user gave: one sentence that says what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """
