"""The one exception that a user is meant to read, and those of libraries that become one."""

# What the libraries' readers raise on a hostile or torn file.
READER_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    AssertionError,
    ArithmeticError,
)


class DoriError(Exception):
    """A mistake in what the user gave: one sentence that says what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """
