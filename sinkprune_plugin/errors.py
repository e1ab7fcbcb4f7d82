"""The one exception type for wrong use."""


class UsageError(ValueError):
    """Wrong input by the user: one line that names the thing, the number and the remedy.

    The command line prints it without a traceback and exits with status 2. It derives from ``ValueError``, so
    library callers can catch it as usual and pydantic reports it as a validation error.
    """
