"""The one exception type for wrong input."""


class UsageError(ValueError):
    """Wrong input by the user: one line that names the thing, the number and the remedy.

    The command line prints it without a traceback and exits with status 2. It derives from ``ValueError``, so
    library callers can catch it as usual and pydantic reports it as a validation error.
    """


def reason_of(error: Exception) -> str:
    """What happened, in one line: libraries' messages begin with it and continue with hints.

    :param error: a library's exception
    :return: first line of its message, or two where the first only announces the second; prefixed with the type where
        the message alone says little, as for a KeyError
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if message and isinstance(error, OSError | ValueError | RuntimeError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def short(value: object, longest: int = 120) -> str:
    """Text from a file or a user, made safe to print within a line.

    :param value: the text, or anything with one
    :param longest: number of characters to keep of it
    :return: the text with ``?`` for line breaks and control characters, and without its middle if it is longer
    """
    text = str(value)
    if len(text) > longest:
        # Names differ at their end.
        tail = longest // 3
        text = f"{text[: longest - tail - 1]}…{text[-tail:]}"
    return "".join(character if character.isprintable() else "?" for character in text)
